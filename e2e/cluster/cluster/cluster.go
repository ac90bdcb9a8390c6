// Package cluster puts the machines together: it brings the cluster up and down, and breaks parts of it.
package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"syscall"

	"millrace.dev/e2e/cluster/cgroup"
	"millrace.dev/e2e/cluster/machine"
	"millrace.dev/e2e/cluster/plan"
)

// Cluster is the one cluster of this host.
type Cluster struct{ plan.Folders }

func (c Cluster) machine(name string) machine.Machine {
	return machine.Machine{Name: name, Folder: c.Machine(name)}
}

func (c Cluster) control() machine.Machine { return c.machine(plan.Control) }

// running is the control machine's first process, or an error that says that there is none.
func (c Cluster) running() (int, error) {
	if pid := c.control().Pid(); pid != 0 {
		return pid, nil
	}
	return 0, fmt.Errorf("the cluster is down")
}

// nodes are the numbers of the nodes that were ever started, whether they are on or off.
func (c Cluster) nodes() []int {
	folders, _ := filepath.Glob(c.Machine("node-*"))
	var numbers []int
	for _, folder := range folders {
		if number, err := plan.NodeNumber(filepath.Base(folder)); err == nil {
			numbers = append(numbers, number)
		}
	}
	sort.Ints(numbers)
	return numbers
}

// notAnothers fails if the cluster that runs on this host has its state elsewhere: names and addresses are for one only.
func (c Cluster) notAnothers() error {
	pids, err := cgroup.Processes(plan.CgroupRoot)
	if err != nil {
		return err
	}
	for pid := range pids {
		// A machine's first process works in the machine's folder.
		folder, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
		if err != nil || !exists(folder) || filepath.Base(filepath.Dir(folder)) != "machines" {
			continue
		}
		if state := filepath.Dir(filepath.Dir(folder)); state != c.State {
			return fmt.Errorf("another cluster runs on this host, in %s: take that one down first, with its own launcher", state)
		}
	}
	return nil
}

// Exclusively runs an action while no other one runs on the same cluster.
func (c Cluster) Exclusively(action func() error) error {
	// Beside the state, which an action may remove.
	if err := os.MkdirAll(filepath.Dir(c.State), 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(c.State+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return err
	}
	return action()
}
