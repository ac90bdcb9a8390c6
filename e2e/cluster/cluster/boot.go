package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"millrace.dev/e2e/cluster/cgroup"
	"millrace.dev/e2e/cluster/control"
	"millrace.dev/e2e/cluster/image"
	"millrace.dev/e2e/cluster/machine"
	"millrace.dev/e2e/cluster/network"
	"millrace.dev/e2e/cluster/node"
	"millrace.dev/e2e/cluster/plan"
)

// bootControl turns the control machine on, and starts its services.
func (c Cluster) bootControl() error {
	m := c.control()
	if m.Pid() == 0 {
		err := c.boot(m, c.Volumes(), nil, network.Control, func() error { return control.Configure(c.Folders) })
		if err != nil {
			return err
		}
	}
	return start(m, control.Services())
}

// bootNode turns a node on, for the first time or again, lets a paused one run on, and starts its services.
func (c Cluster) bootNode(number int) error {
	controlPid, err := c.running()
	if err != nil {
		return err
	}
	m := c.machine(plan.Node(number))
	if err := c.NodeResume(number); err != nil {
		return err
	}
	if m.Pid() == 0 {
		// What was left of its pods, if it was killed.
		if err := cgroup.Remove(node.Group(number)); err != nil {
			return err
		}
		err := c.boot(m, filepath.Join(c.Volumes(), m.Name), node.KernelSettings(),
			func(pid int) error { return network.Node(controlPid, pid, number) },
			func() error { return node.Configure(c.Folders, number) })
		if err != nil {
			return err
		}
	}
	services := node.Services(number)
	if err := start(m, services[:1]); err != nil {
		return err
	}
	// Before the kubelet, which must not try to fetch them.
	if err := c.loadKept(m); err != nil {
		return err
	}
	return start(m, services[1:])
}

// boot turns a machine on, and prepares it for its services.
func (c Cluster) boot(
	m machine.Machine, volumes string, files map[string]string, join func(pid int) error, configure func() error,
) error {
	lib, log := filepath.Join(m.Folder, "lib"), filepath.Join(m.Folder, "log")
	programs := filepath.Join(lib, filepath.Base(plan.Programs))
	for _, folder := range []string{c.Config(m.Name), log, programs, filepath.Join(lib, filepath.Base(plan.Volumes)), volumes} {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return err
		}
	}
	group := filepath.Join(plan.CgroupRoot, m.Name, "machine")
	if err := cgroup.Make(group); err != nil {
		return err
	}
	err := m.Boot(c.Program("machine"), machine.Description{
		Name:  m.Name,
		Group: group,
		Mounts: []machine.Mount{
			{From: c.Programs, To: filepath.Join(lib, filepath.Base(plan.Programs))},
			{From: volumes, To: filepath.Join(lib, filepath.Base(plan.Volumes))},
			{From: log, To: "/var/log"},
			{From: lib, To: "/var/lib"},
		},
		Files: files,
	})
	if err != nil {
		return err
	}
	prepare := func() error {
		if err := network.Forward(m.Pid()); err != nil {
			return err
		}
		if err := join(m.Pid()); err != nil {
			return err
		}
		return configure()
	}
	if err := prepare(); err != nil {
		// A machine that is on is taken for one that is prepared.
		return errors.Join(err, m.Kill())
	}
	return nil
}

// loadKept loads the images that this cluster was given, unless the node has them.
func (c Cluster) loadKept(m machine.Machine) error {
	if err := eventually(containerdLimit, func() error {
		_, err := m.Run(nil, "ctr", "version")
		return err
	}); err != nil {
		return err
	}
	has, err := image.Has(m, plan.PauseImage)
	if err != nil || has {
		return err
	}
	archives, err := filepath.Glob(filepath.Join(c.images(), "*.tar"))
	if err != nil {
		return err
	}
	for _, archive := range archives {
		if err := image.Load(m, archive); err != nil {
			return err
		}
	}
	return nil
}

func start(m machine.Machine, services []machine.Service) error {
	for _, service := range services {
		if err := m.Start(service); err != nil {
			return fmt.Errorf("%s: %w", service.Name, err)
		}
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
