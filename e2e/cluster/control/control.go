// Package control says how the control plane's services are started.
package control

import (
	_ "embed"
	"fmt"
	"path/filepath"

	"millrace.dev/e2e/cluster/filled"
	"millrace.dev/e2e/cluster/kubeconfig"
	"millrace.dev/e2e/cluster/machine"
	"millrace.dev/e2e/cluster/pki"
	"millrace.dev/e2e/cluster/plan"
)

// The services' names.
const (
	Etcd              = "etcd"
	APIServer         = "kube-apiserver"
	ControllerManager = "kube-controller-manager"
	Scheduler         = "kube-scheduler"
	DNS               = "dns"
	Provisioner       = "provisioner"
)

//go:embed Corefile
var corefile string

// Services are the control plane's, in the order of their start: each needs the ones before it.
func Services() []machine.Service {
	return []machine.Service{
		{Name: Etcd, Args: []string{
			"etcd",
			"--data-dir=/var/lib/etcd",
			// In the machine's own namespace, hence for nobody else: no certificates.
			"--listen-client-urls=http://127.0.0.1:2379",
			"--advertise-client-urls=http://127.0.0.1:2379",
			"--listen-peer-urls=http://127.0.0.1:2380",
			// The state need not survive the host's crash, and fsync slows all who share its disk.
			"--unsafe-no-fsync",
		}},
		kubernetes(APIServer,
			"--etcd-servers=http://127.0.0.1:2379",
			"--advertise-address="+plan.ControlAddress,
			fmt.Sprintf("--secure-port=%d", plan.APIPort),
			"--service-cluster-ip-range="+plan.ServiceRange,
			"--allow-privileged",
			"--authorization-mode=Node,RBAC",
			"--enable-admission-plugins=NodeRestriction",
			"--client-ca-file="+file("ca.crt"),
			"--tls-cert-file="+file("apiserver.crt"),
			"--tls-private-key-file="+file("apiserver.key"),
			"--kubelet-client-certificate="+file("kubelet-client.crt"),
			"--kubelet-client-key="+file("kubelet-client.key"),
			"--kubelet-certificate-authority="+file("ca.crt"),
			// The nodes' names don't resolve.
			"--kubelet-preferred-address-types=InternalIP",
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			"--service-account-key-file="+file("service-account.crt"),
			"--service-account-signing-key-file="+file("service-account.key"),
			// Tests wait for a dead node's pods to move: 10 s instead of 5 min.
			"--default-not-ready-toleration-seconds=10",
			"--default-unreachable-toleration-seconds=10",
			"--profiling=false",
		),
		kubernetes(ControllerManager,
			"--kubeconfig="+file(ControllerManager+".kubeconfig"),
			"--bind-address=127.0.0.1",
			"--leader-elect=false",
			"--use-service-account-credentials",
			"--service-account-private-key-file="+file("service-account.key"),
			"--root-ca-file="+file("ca.crt"),
			"--cluster-signing-cert-file="+file("ca.crt"),
			"--cluster-signing-key-file="+file("ca.key"),
			// Made if it is missing; by default in a folder of the host.
			"--flex-volume-plugin-dir=/var/lib/flex-volume-plugins",
			// A dead node is seen in 20 s instead of 50; its Lease is renewed every 2.5 s (node/kubelet.yaml).
			"--node-monitor-grace-period=20s",
			"--profiling=false",
		),
		kubernetes(Scheduler,
			"--kubeconfig="+file(Scheduler+".kubeconfig"),
			"--bind-address=127.0.0.1",
			"--leader-elect=false",
			"--profiling=false",
		),
		{Name: DNS, Args: []string{plan.Programs + "/dns", "-conf", file("Corefile")}},
		{Name: Provisioner, Args: []string{plan.Programs + "/launcher", "provision", file("admin.kubeconfig")}},
	}
}

func kubernetes(component string, flags ...string) machine.Service {
	return machine.Service{Name: component, Args: append([]string{plan.Programs + "/kubernetes", component}, flags...)}
}

// file is a path as the machine sees it.
func file(name string) string { return filepath.Join(plan.Config, name) }

// Configure writes what the services are started with, and the administrator's kubeconfig for the host.
func Configure(folders plan.Folders) error {
	folder := folders.Config(plan.Control)
	authority, err := pki.NewAuthority("millrace-cluster")
	if err != nil {
		return err
	}
	if err := authority.Write(Authority(folders)); err != nil {
		return err
	}
	pairs := []struct {
		file, name string
		groups     []string
		hosts      []string
	}{
		{"apiserver", "kube-apiserver", nil, []string{
			plan.ControlAddress, plan.APIServiceAddr, "127.0.0.1", "localhost",
			"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
		}},
		{"kubelet-client", "kube-apiserver-kubelet-client", []string{"system:masters"}, nil},
		// Only its key is used.
		{"service-account", "service-account", nil, nil},
	}
	for _, pair := range pairs {
		issued, err := authority.Issue(pair.name, pair.groups, pair.hosts...)
		if err != nil {
			return err
		}
		if err := issued.Write(filepath.Join(folder, pair.file)); err != nil {
			return err
		}
	}
	values := map[string]string{"Address": plan.ControlAddress, "Kubeconfig": file("admin.kubeconfig")}
	if err := filled.Write(filepath.Join(folder, "Corefile"), corefile, values); err != nil {
		return err
	}
	users := []struct {
		path, name string
		groups     []string
	}{
		{folder + "/" + ControllerManager + ".kubeconfig", "system:kube-controller-manager", nil},
		{folder + "/" + Scheduler + ".kubeconfig", "system:kube-scheduler", nil},
		{folder + "/admin.kubeconfig", "admin", []string{"system:masters"}},
		{folders.Kubeconfig(), "admin", []string{"system:masters"}},
	}
	for _, user := range users {
		if err := kubeconfig.Write(user.path, authority, user.name, user.groups); err != nil {
			return err
		}
	}
	return nil
}

// Authority is where the cluster's authority is kept, without the endings.
func Authority(folders plan.Folders) string { return filepath.Join(folders.Config(plan.Control), "ca") }
