// Package cgroup makes and removes trees of control groups, in version 1 (a tree in each hierarchy) as in version 2 (one tree).
package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Hierarchies are the mounted hierarchies below /sys/fs/cgroup.
func Hierarchies() ([]string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, line := range strings.Split(string(mounts), "\n") {
		fields := strings.Fields(line)
		if len(fields) > 2 && (fields[2] == "cgroup" || fields[2] == "cgroup2") && strings.HasPrefix(fields[1], "/sys/fs/cgroup") {
			found = append(found, fields[1])
		}
	}
	if len(found) == 0 {
		return nil, errors.New("no control groups are mounted below /sys/fs/cgroup")
	}
	return found, nil
}

// Make makes a group, with its parents, in each hierarchy.
func Make(group string) error {
	hierarchies, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, hierarchy := range hierarchies {
		folder := hierarchy
		for _, part := range strings.Split(group, "/") {
			parent := folder
			folder = filepath.Join(parent, part)
			if err := delegate(parent); err != nil {
				return err
			}
			if err := os.Mkdir(folder, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
			// In version 1 a new cpuset is empty, and no process may enter it.
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				if err := inherit(parent, folder, file); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// delegate lets the children of a group have all of its controllers: version 2 only.
func delegate(folder string) error {
	controllers, err := os.ReadFile(filepath.Join(folder, "cgroup.controllers"))
	if err != nil {
		return nil // version 1
	}
	for _, controller := range strings.Fields(string(controllers)) {
		// Some (cpu, when real-time processes run) may refuse; the kubelet says so if it needs them.
		_ = os.WriteFile(filepath.Join(folder, "cgroup.subtree_control"), []byte("+"+controller), 0)
	}
	return nil
}

func inherit(parent, folder, file string) error {
	own, err := os.ReadFile(filepath.Join(folder, file))
	if err != nil || len(bytes.TrimSpace(own)) > 0 {
		return nil // not a cpuset, or filled
	}
	value, err := os.ReadFile(filepath.Join(parent, file))
	if err != nil || len(bytes.TrimSpace(value)) == 0 {
		return nil // version 2: empty means all
	}
	return os.WriteFile(filepath.Join(folder, file), value, 0)
}

// Enter moves the calling process into a group, in each hierarchy.
func Enter(group string) error {
	hierarchies, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, hierarchy := range hierarchies {
		// Not its number, which is another one in the process namespace that it sees itself in: 0 is "me".
		if err := os.WriteFile(filepath.Join(hierarchy, group, "cgroup.procs"), []byte("0"), 0); err != nil {
			return err
		}
	}
	return nil
}

// Kill ends every process in a tree, and returns when none is left.
func Kill(group string) error {
	return untilDone(20*time.Second, func() error {
		count, err := Signal(group, syscall.SIGKILL)
		if err == nil && count > 0 {
			err = fmt.Errorf("%d processes are still in the control group %s", count, group)
		}
		return err
	})
}

// Signal sends a signal to every process in a tree, and returns how many there are.
func Signal(group string, signal syscall.Signal) (int, error) {
	pids, err := Processes(group)
	for pid := range pids {
		_ = syscall.Kill(pid, signal) // it may have ended by now
	}
	return len(pids), err
}

// Remove removes a tree without processes, from each hierarchy.
func Remove(group string) error {
	return untilDone(10*time.Second, func() error {
		var last error
		err := walk(group, func(folders []string) {
			for i := len(folders) - 1; i >= 0; i-- {
				if err := syscall.Rmdir(folders[i]); err != nil && err != syscall.ENOENT {
					last = fmt.Errorf("%s: %w", folders[i], err)
				}
			}
		})
		return errors.Join(err, last)
	})
}

// Processes are those in a tree.
func Processes(group string) (map[int]bool, error) {
	pids := map[int]bool{}
	err := walk(group, func(folders []string) {
		for _, folder := range folders {
			list, _ := os.ReadFile(filepath.Join(folder, "cgroup.procs"))
			for _, field := range strings.Fields(string(list)) {
				if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
					pids[pid] = true
				}
			}
		}
	})
	return pids, err
}

// walk calls visit for each hierarchy with the folders of the tree there, parents first.
func walk(group string, visit func(folders []string)) error {
	hierarchies, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, hierarchy := range hierarchies {
		var folders []string
		_ = filepath.WalkDir(filepath.Join(hierarchy, group), func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				folders = append(folders, path)
			}
			return nil // groups come and go as one looks
		})
		visit(folders)
	}
	return nil
}

func untilDone(limit time.Duration, try func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := try()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}
