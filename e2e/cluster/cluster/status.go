package cluster

import (
	"context"
	"fmt"
	"io"
	"strings"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"millrace.dev/e2e/cluster/network"
	"millrace.dev/e2e/cluster/plan"
)

// Status says what is on, and returns an error if not all is as it should be.
func (c Cluster) Status(ctx context.Context, out io.Writer) error {
	pid, err := c.running()
	if err != nil {
		return err
	}
	ready := c.readiness(ctx)
	whole := c.describe(out, plan.Control, ready[plan.Control])
	for _, number := range c.nodes() {
		name := plan.Node(number)
		notes := []string{ready[name]}
		if c.machine(name).Pid() != 0 && !network.Plugged(pid, number) {
			notes = append(notes, "cut off")
		}
		whole = c.describe(out, name, notes...) && whole && ready[name] == "Ready" && len(notes) == 1
	}
	fmt.Fprintf(out, "\nkubeconfig: %s\nlogs: %s/*/log\n", c.Kubeconfig(), c.Machine(""))
	if !whole {
		return fmt.Errorf("the cluster is not whole")
	}
	return nil
}

// describe writes a line on a machine and one on each of its services that needs one.
func (c Cluster) describe(out io.Writer, name string, notes ...string) bool {
	m := c.machine(name)
	if m.Pid() == 0 {
		fmt.Fprintf(out, "%-8s  off\n", name)
		return false
	}
	services, err := m.Services()
	if err != nil {
		fmt.Fprintf(out, "%-8s  %v\n", name, err)
		return false
	}
	whole := true
	var states []string
	for _, service := range services {
		state := service.Name
		if service.Pid == 0 {
			whole = false
			state += " (stopped)"
		}
		if service.Restarts > 0 {
			state += fmt.Sprintf(" (started again %d times)", service.Restarts)
		}
		states = append(states, state)
	}
	fmt.Fprintf(out, "%-8s  %s: %s\n", name, strings.Join(notes, ", "), strings.Join(states, ", "))
	return whole
}

// readiness is what the API server says of each machine.
func (c Cluster) readiness(ctx context.Context) map[string]string {
	ready := map[string]string{plan.Control: "the API server doesn't answer"}
	api, err := c.client()
	if err != nil {
		return ready
	}
	nodes, err := api.CoreV1().Nodes().List(ctx, meta.ListOptions{})
	if err != nil {
		return ready
	}
	ready[plan.Control] = "Ready"
	for _, node := range nodes.Items {
		ready[node.Name] = "NotReady"
		if is, _ := nodeReady(&node); is {
			ready[node.Name] = "Ready"
		}
	}
	return ready
}
