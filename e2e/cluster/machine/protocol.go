// Package machine gives a process tree what makes it a machine of its own: namespaces for its network, mounts, processes, host name and
// IPC, and a control group. The first process of a machine (cmd/machine) starts its services and starts them again when they end; the
// launcher, on the host, talks to it. Killing that process is pulling the plug: the kernel ends all that runs in the machine and takes
// its mounts and links away, so that nothing of it can stay behind.
package machine

// Description is what the first process of a machine needs to know before it can be talked to.
type Description struct {
	Name string
	// Group is the control group of the machine's own services.
	Group string
	// Mounts are bound over folders that the host has, in this order, so that the machine writes only to its own.
	Mounts []Mount
	// Files are bound over files, with this content.
	Files map[string]string
}

// Mount binds a folder of the host.
type Mount struct{ From, To string }

// Service is a process that shall run.
type Service struct {
	Name string
	Args []string
}

// Request is one line to a machine's first process.
type Request struct {
	// Start this service, unless it runs.
	Start *Service `json:",omitempty"`
	// Kill the service of this name, and do not start it again.
	Kill string `json:",omitempty"`
}

// Reply says how the services are after the request.
type Reply struct {
	Error    string `json:",omitempty"`
	Services []State
}

// State is how a service is.
type State struct {
	Name string
	// Pid is 0 while it doesn't run. It is of the machine's own process namespace.
	Pid int
	// Restarts counts how often it ended by itself.
	Restarts int
	Wanted   bool
}

// The files in a machine's folder.
const (
	descriptionFile = "machine.json"
	socketFile      = "machine.sock"
	pidFile         = "machine.pid"
	logFile         = "machine.log"
)
