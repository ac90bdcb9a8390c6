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
	ready, err := c.readiness(ctx)
	if err != nil {
		fmt.Fprintln(out, "the API server doesn't answer:", err)
	}
	whole := c.describe(out, plan.Control) && err == nil
	for _, number := range c.nodes() {
		name := plan.Node(number)
		var notes []string
		if own := c.machine(name).Pid(); own != 0 {
			if !network.Plugged(pid, number) {
				notes = append(notes, "cut off")
			}
			for _, other := range network.Parted(own) {
				notes = append(notes, "cut off from "+other)
			}
		}
		whole = whole && len(notes) == 0 && ready[name]
		if err == nil && !ready[name] {
			notes = append(notes, "not ready")
		}
		whole = c.describe(out, name, notes...) && whole
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
		fmt.Fprintf(out, "%-8s  OFF\n", name)
		return false
	}
	services, err := m.Services()
	if err != nil {
		fmt.Fprintf(out, "%-8s  %v\n", name, err)
		return false
	}
	whole := true
	states := []string{}
	for _, service := range services {
		state := service.Name
		if service.Pid == 0 {
			whole = false
			state += " STOPPED"
		}
		if service.Restarts > 0 {
			state += fmt.Sprintf(" (started again %d times)", service.Restarts)
		}
		states = append(states, state)
	}
	if len(notes) > 0 {
		states = append([]string{strings.ToUpper(strings.Join(notes, ", "))}, states...)
	}
	fmt.Fprintf(out, "%-8s  %s\n", name, strings.Join(states, ", "))
	return whole
}

// readiness is what the API server says of each node.
func (c Cluster) readiness(ctx context.Context) (map[string]bool, error) {
	api, err := c.client()
	if err != nil {
		return nil, err
	}
	nodes, err := api.CoreV1().Nodes().List(ctx, meta.ListOptions{})
	if err != nil {
		return nil, err
	}
	ready := map[string]bool{}
	for _, node := range nodes.Items {
		ready[node.Name], _ = nodeReady(&node)
	}
	return ready, nil
}
