package cluster

import (
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
	fresh := !exists(c.Kubeconfig()) // written last
	if m.Pid() == 0 {
		if err := c.boot(m, c.Volumes(), nil); err != nil {
			return err
		}
		if err := network.Forward(m.Pid()); err != nil {
			return err
		}
		if err := network.Control(m.Pid()); err != nil {
			return err
		}
	}
	if fresh {
		if err := control.Configure(c.Folders); err != nil {
			return err
		}
	}
	return start(m, control.Services())
}

// bootNode turns a node on, for the first time or again, and starts its services.
func (c Cluster) bootNode(number int) error {
	controlPid, err := c.running()
	if err != nil {
		return err
	}
	m := c.machine(plan.Node(number))
	if m.Pid() == 0 {
		// What was left of its pods, if it was killed.
		if err := cgroup.Remove(node.Group(number)); err != nil {
			return err
		}
		volumes := filepath.Join(c.Volumes(), m.Name)
		if err := os.MkdirAll(volumes, 0o755); err != nil {
			return err
		}
		files := node.KernelSettings()
		if err := c.boot(m, volumes, files); err != nil {
			return err
		}
		if err := network.Forward(m.Pid()); err != nil {
			return err
		}
		if err := network.Node(controlPid, m.Pid(), number); err != nil {
			return err
		}
		if err := node.Configure(c.Folders, number); err != nil {
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

func (c Cluster) boot(m machine.Machine, volumes string, files map[string]string) error {
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
	return m.Boot(c.Program("machine"), machine.Description{
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
