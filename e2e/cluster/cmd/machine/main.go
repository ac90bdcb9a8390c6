// The first process of a machine (see package machine). It knows nothing of Kubernetes, and is small, since each machine has one.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"millrace.dev/e2e/cluster/machine"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	if os.Getpid() != 1 {
		return fmt.Errorf("this is started by the launcher, as the first process of a machine")
	}
	description, err := machine.ReadDescription()
	if err != nil {
		return err
	}
	// Before the mounts, which may hide the working folder's path.
	listener, err := machine.Listen()
	if err != nil {
		return err
	}
	if err := machine.Settle(description); err != nil {
		return err
	}
	services := machine.NewServices("/var/log")
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGCHLD)
	go services.Reap(ended)
	return machine.Serve(listener, services)
}
