package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/vishvananda/netns"

	"millrace.dev/e2e/cluster/cgroup"
	"millrace.dev/e2e/cluster/plan"
)

// In becomes a program of the host that uses a node's network and the cluster's DNS, as if it were a process on that node. It needs no API server, and
// doesn't end with the node; only Down ends it.
func (c Cluster) In(number int, command []string) error {
	if err := c.known(number); err != nil {
		return err
	}
	pid := c.machine(plan.Node(number)).Pid()
	if pid == 0 {
		return fmt.Errorf("%s is off", plan.Node(number))
	}
	path, err := exec.LookPath(command[0])
	if err != nil {
		return err
	}
	guests := filepath.Join(plan.CgroupRoot, "guests")
	if err := cgroup.Make(guests); err != nil {
		return err
	}
	if err := cgroup.Enter(guests); err != nil {
		return err
	}
	// Namespaces belong to a thread; the one that calls exec becomes the process.
	runtime.LockOSThread()
	if err := syscall.Unshare(syscall.CLONE_NEWNS); err != nil {
		return err
	}
	if err := syscall.Mount("none", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	resolver, err := filepath.EvalSymlinks("/etc/resolv.conf")
	if err != nil {
		return err
	}
	own := filepath.Join(c.Config(plan.Node(number)), "resolv.conf")
	if err := syscall.Mount(own, resolver, "", syscall.MS_BIND, ""); err != nil {
		return err
	}
	namespace, err := netns.GetFromPid(pid)
	if err != nil {
		return err
	}
	if err := netns.Set(namespace); err != nil {
		return err
	}
	return syscall.Exec(path, command, os.Environ())
}
