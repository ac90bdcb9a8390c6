// Package plan says who is who: the machines' names and addresses, and where each keeps what. It does nothing.
package plan

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

const (
	// Control is the machine of the control plane. It is no node: no pod is ever scheduled to it.
	Control = "control"
	// NodesMax bounds the routes that each machine gets when it boots, so that a node may come later.
	NodesMax = 16

	// The machines' network. It exists in the machines' own namespaces, and on HostLink in the host's.
	ControlAddress = "10.213.0.1"
	HostAddress    = "10.213.0.254"
	PrefixBits     = 24
	HostLink       = "millrace0"

	PodRange       = "10.244.0.0/16"
	ServiceRange   = "10.96.0.0/16"
	APIServiceAddr = "10.96.0.1"
	DNSServiceAddr = "10.96.0.10"
	APIPort        = 6443

	// CgroupRoot is the folder, in each hierarchy of control groups, below which every process of the cluster lives.
	CgroupRoot = "millrace-cluster"
	// PauseImage is the cluster's own image: the one in the repository's cmd/pod.
	PauseImage = "localhost/millrace-cluster/pod:1"
	// StorageClass is the default class, and Provisioner who serves it.
	StorageClass = "standard"
	Provisioner  = "cluster.millrace.dev/folder"
)

// APIServer is the API server's URL, from the host as from each machine.
var APIServer = fmt.Sprintf("https://%s:%d", ControlAddress, APIPort)

// Inside each machine, the folders that it shares with the host. The rest of the file system is the host's, as it is.
const (
	// Config holds what this machine's services are started with.
	Config = "/var/lib/cluster"
	// Programs holds the built programs.
	Programs = "/var/lib/cluster-programs"
	// Volumes holds the persistent volumes: of this node, or of all nodes (in a folder each) on the control machine.
	Volumes = "/var/lib/cluster-volumes"
)

// Node is the name of a node by its number, from 1.
func Node(number int) string { return fmt.Sprintf("node-%d", number) }

// NodeNumber is the number of a node by its name or number.
func NodeNumber(name string) (int, error) {
	number, err := strconv.Atoi(strings.TrimPrefix(name, "node-"))
	if err != nil || number < 1 || number > NodesMax {
		return 0, fmt.Errorf("no such node: %q (nodes are 1 to %d, or node-1 to node-%d)", name, NodesMax, NodesMax)
	}
	return number, nil
}

// NodeAddress is the address of a node in the machines' network.
func NodeAddress(number int) string { return fmt.Sprintf("10.213.0.%d", 10+number) }

// PodRangeOf is the part of PodRange that a node's pods get.
func PodRangeOf(number int) string { return fmt.Sprintf("10.244.%d.0/24", number) }

// Machine is the name of a machine by its number: 0 is the control machine.
func Machine(number int) string {
	if number == 0 {
		return Control
	}
	return Node(number)
}

// MachineAddress is its address.
func MachineAddress(number int) string {
	if number == 0 {
		return ControlAddress
	}
	return NodeAddress(number)
}

// MachineNumber is its number, by its name or number.
func MachineNumber(name string) (int, error) {
	if name == Control {
		return 0, nil
	}
	return NodeNumber(name)
}

// Zone is the failure domain of a node. Each node has its own, so that tests see rack awareness at work.
func Zone(number int) string { return fmt.Sprintf("zone-%d", number) }

// Folders are the places on the host.
type Folders struct {
	// Programs holds the built programs; it outlives the cluster.
	Programs string
	// State holds all that a running cluster has; it is gone with it.
	State string
}

// Kubeconfig is the administrator's.
func (f Folders) Kubeconfig() string { return filepath.Join(f.State, "kubeconfig") }

// Machine is the folder of one machine.
func (f Folders) Machine(name string) string { return filepath.Join(f.State, "machines", name) }

// Config is what the machine sees as Config.
func (f Folders) Config(name string) string { return f.Machine(name) + "/lib/cluster" }

// Volumes is the folder with a folder for each node's persistent volumes.
func (f Folders) Volumes() string { return filepath.Join(f.State, "volumes") }

// Program is the path of a built program on the host.
func (f Folders) Program(name string) string { return filepath.Join(f.Programs, name) }
