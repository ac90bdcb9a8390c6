// The only program in the cluster's own image: it holds a pod's namespaces, and it proves a pod's network and volumes.
package main

import (
	"context"
	"fmt"
	"io"
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
	case len(os.Args) == 4 && os.Args[1] == "serve":
		if err := serve(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	default:
		fmt.Fprintln(os.Stderr, "usage: pod pause | reach HOST:PORT | serve PORT FILE")
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
			// What `serve` says; others wait for us to speak, and are reached all the same.
			_ = connection.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			_, _ = io.Copy(os.Stdout, connection)
			return
		}
		fmt.Fprintln(os.Stderr, err)
		if ctx.Err() != nil {
			os.Exit(1)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// serve adds a line to a file and answers each connection with all of its lines.
func serve(port, path string) error {
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(file, name); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			return err
		}
		if content, err := os.ReadFile(path); err == nil {
			_, _ = connection.Write(content)
		}
		connection.Close()
	}
}
