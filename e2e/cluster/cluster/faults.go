package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"millrace.dev/e2e/cluster/cgroup"
	"millrace.dev/e2e/cluster/control"
	"millrace.dev/e2e/cluster/network"
	"millrace.dev/e2e/cluster/node"
	"millrace.dev/e2e/cluster/plan"
)

// NodeKill is a power cut: all processes of the node end at once, and nobody is told.
func (c Cluster) NodeKill(number int) error {
	if c.machine(plan.Node(number)).Pid() == 0 {
		return c.known(number)
	}
	// First the cable: as they die, the processes' connections would be closed, and the other ends would know at once.
	if err := c.NodeCut(number); err != nil {
		return err
	}
	return c.machine(plan.Node(number)).Kill()
}

// NodeWipe is a power cut after which the node's disk is empty: its volumes are lost.
func (c Cluster) NodeWipe(number int) error {
	if err := c.NodeKill(number); err != nil {
		return err
	}
	folders, err := filepath.Glob(filepath.Join(c.Volumes(), plan.Node(number), "*"))
	if err != nil {
		return err
	}
	for _, folder := range append(folders, filepath.Join(c.Machine(plan.Node(number)), "lib")) {
		if err := os.RemoveAll(folder); err != nil {
			return err
		}
	}
	return nil
}

// NodeCut takes the node's cable out: its processes go on, and reach nobody outside.
func (c Cluster) NodeCut(number int) error { return c.plug(number, false) }

// NodePart cuts the node off from one other machine (0 is the control machine) only.
func (c Cluster) NodePart(number, other int) error { return c.part(number, other, true) }

// NodeHeal mends what NodeCut and NodePart did to the node.
func (c Cluster) NodeHeal(number int) error {
	if err := c.plug(number, true); err != nil {
		return err
	}
	for _, other := range append(c.nodes(), 0) {
		if other == number || c.machine(plan.Machine(other)).Pid() == 0 {
			continue
		}
		if err := c.part(number, other, false); err != nil {
			return err
		}
	}
	return nil
}

func (c Cluster) part(number, other int, apart bool) error {
	if number == other {
		return fmt.Errorf("%s can't be cut off from itself", plan.Node(number))
	}
	var pids [2]int
	for i, name := range []string{plan.Node(number), plan.Machine(other)} {
		if pids[i] = c.machine(name).Pid(); pids[i] == 0 {
			return fmt.Errorf("%s is off", name)
		}
	}
	return network.Part(pids[0], number, pids[1], other, apart)
}

func (c Cluster) plug(number int, in bool) error {
	pid, err := c.running()
	if err != nil {
		return err
	}
	if err := c.known(number); err != nil {
		return err
	}
	return network.Plug(pid, number, in)
}

// NodePause stops every process of the node, pods' too, where it stands.
func (c Cluster) NodePause(number int) error {
	if err := c.known(number); err != nil {
		return err
	}
	return c.signal(number, syscall.SIGSTOP)
}

// NodeResume lets them go on.
func (c Cluster) NodeResume(number int) error { return c.signal(number, syscall.SIGCONT) }

func (c Cluster) signal(number int, signal syscall.Signal) error {
	_, err := cgroup.Signal(node.Group(number), signal)
	return err
}

// APIServerStop kills the API server. All else runs on.
func (c Cluster) APIServerStop() error {
	if _, err := c.running(); err != nil {
		return err
	}
	return c.control().KillService(control.APIServer)
}

func (c Cluster) known(number int) error {
	if !exists(c.Machine(plan.Node(number))) {
		return fmt.Errorf("there is no %s", plan.Node(number))
	}
	return nil
}

func killAll() error { return cgroup.Kill(plan.CgroupRoot) }

func removeGroups() error { return cgroup.Remove(plan.CgroupRoot) }
