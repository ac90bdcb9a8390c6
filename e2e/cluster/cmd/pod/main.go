// The only program in the cluster's own image: it holds a pod's namespaces, and it proves a pod's network.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	switch {
	case len(os.Args) == 2 && os.Args[1] == "pause":
		pause()
	case len(os.Args) == 3 && os.Args[1] == "reach":
		reach(os.Args[2])
	default:
		fmt.Fprintln(os.Stderr, "usage: pod pause | reach HOST:PORT")
		os.Exit(2)
	}
}

// pause is the first process of a pod: when containers share its process namespace, their orphans become its children.
func pause() {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGCHLD)
	for received := range signals {
		if received != syscall.SIGCHLD {
			return
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}

// reach resolves a name and connects to it, until both succeed.
func reach(address string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	dialer := net.Dialer{Timeout: 2 * time.Second}
	for {
		connection, err := dialer.DialContext(ctx, "tcp", address)
		if err == nil {
			fmt.Println("connected to", address, "at", connection.RemoteAddr())
			return
		}
		fmt.Fprintln(os.Stderr, err)
		if ctx.Err() != nil {
			os.Exit(1)
		}
		time.Sleep(200 * time.Millisecond)
	}
}
