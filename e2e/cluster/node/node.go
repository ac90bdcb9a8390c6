// Package node says how a node's services are started.
package node

import (
	"embed"
	"fmt"
	"os"
	"path/filepath"

	"millrace.dev/e2e/cluster/control"
	"millrace.dev/e2e/cluster/filled"
	"millrace.dev/e2e/cluster/kubeconfig"
	"millrace.dev/e2e/cluster/machine"
	"millrace.dev/e2e/cluster/pki"
	"millrace.dev/e2e/cluster/plan"
)

// The services' names.
const (
	Containerd = "containerd"
	Kubelet    = "kubelet"
	KubeProxy  = "kube-proxy"
)

//go:embed containerd.toml cni.json kubelet.yaml kube-proxy.yaml
var templates embed.FS

// Services are a node's, in the order of their start.
func Services(number int) []machine.Service {
	return []machine.Service{
		{Name: Containerd, Args: []string{"containerd", "--config", file("containerd.toml")}},
		{Name: Kubelet, Args: []string{
			plan.Programs + "/kubernetes", "kubelet",
			"--config=" + file("kubelet.yaml"),
			"--kubeconfig=" + file("kubelet.kubeconfig"),
			"--hostname-override=" + plan.Node(number),
			"--node-ip=" + plan.NodeAddress(number),
			"--node-labels=topology.kubernetes.io/zone=" + plan.Zone(number),
		}},
		{Name: KubeProxy, Args: []string{
			plan.Programs + "/kubernetes", "kube-proxy",
			"--config=" + file("kube-proxy.yaml"),
		}},
	}
}

// Group is the control group below which the node's pods are. The machine's own services are in a leaf beside them, since in version 2 a group
// has either processes or children.
func Group(number int) string { return filepath.Join(plan.CgroupRoot, plan.Node(number)) }

// KernelSettings are the host-wide settings that a kubelet makes when it starts. Files of the same content are bound over them in the
// machine: it finds them made, and the host keeps its own.
func KernelSettings() map[string]string {
	return map[string]string{
		"/proc/sys/vm/overcommit_memory":      "1\n",
		"/proc/sys/vm/panic_on_oom":           "0\n",
		"/proc/sys/kernel/panic":              "10\n",
		"/proc/sys/kernel/panic_on_oops":      "1\n",
		"/proc/sys/kernel/keys/root_maxkeys":  "1000000\n",
		"/proc/sys/kernel/keys/root_maxbytes": "25000000\n",
	}
}

func file(name string) string { return filepath.Join(plan.Config, name) }

// Configure writes what the services are started with.
func Configure(folders plan.Folders, number int) error {
	name := plan.Node(number)
	folder := folders.Config(name)
	authority, err := pki.ReadAuthority(control.Authority(folders))
	if err != nil {
		return err
	}
	serving, err := authority.Issue(name, nil, name, plan.NodeAddress(number))
	if err != nil {
		return err
	}
	if err := serving.Write(filepath.Join(folder, "kubelet")); err != nil {
		return err
	}
	user := "system:node:" + name
	if err := kubeconfig.Write(folder+"/kubelet.kubeconfig", authority, user, []string{"system:nodes"}); err != nil {
		return err
	}
	if err := kubeconfig.Write(folder+"/kube-proxy.kubeconfig", authority, "system:kube-proxy", nil); err != nil {
		return err
	}
	values := map[string]string{
		"Config":     plan.Config,
		"DNS":        plan.DNSServiceAddr,
		"Group":      Group(number),
		"Name":       name,
		"PauseImage": plan.PauseImage,
		"PodRange":   plan.PodRangeOf(number),
		"Pods":       plan.PodRange,
	}
	for from, to := range map[string]string{
		"containerd.toml": "containerd.toml",
		"cni.json":        "cni/10-pods.conflist",
		"kubelet.yaml":    "kubelet.yaml",
		"kube-proxy.yaml": "kube-proxy.yaml",
	} {
		text, err := templates.ReadFile(from)
		if err != nil {
			return err
		}
		if err := filled.Write(filepath.Join(folder, to), string(text), values); err != nil {
			return err
		}
	}
	if err := os.WriteFile(folder+"/ca.crt", authority.Certificate, 0o644); err != nil {
		return err
	}
	// For pods that ask for the node's, and for what `in` runs.
	resolver := fmt.Sprintf("nameserver %s\nsearch svc.cluster.local cluster.local\n", plan.DNSServiceAddr)
	return os.WriteFile(folder+"/resolv.conf", []byte(resolver), 0o644)
}
