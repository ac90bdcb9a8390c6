package machine

import (
	"fmt"
	"os"
	"sort"
	"strings"
	"syscall"

	"millrace.dev/e2e/cluster/cgroup"
)

// Settle makes the calling process, which Boot has started in new namespaces, at home in them.
func Settle(description Description) error {
	if err := cgroup.Enter(description.Group); err != nil {
		return err
	}
	if err := syscall.Sethostname([]byte(description.Name)); err != nil {
		return err
	}
	// What is mounted here must not show on the host, hence private; and the kubelet's mounts must reach the containers that ask for it,
	// hence shared, among this machine's own.
	for _, kind := range []uintptr{syscall.MS_PRIVATE, syscall.MS_SHARED} {
		if err := mount("none", "/", "", kind|syscall.MS_REC, ""); err != nil {
			return err
		}
	}
	// The host's shows other processes under the numbers of this namespace.
	if err := mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, ""); err != nil {
		return err
	}
	for _, bound := range description.Mounts {
		if err := mount(bound.From, bound.To, "", syscall.MS_BIND|syscall.MS_REC, ""); err != nil {
			return err
		}
	}
	// Last, since some of the folders above may lie in it. In memory, as on a real machine: it is empty after each boot.
	if err := mount("run", "/run", "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=755"); err != nil {
		return err
	}
	return overlayFiles(description.Files)
}

func overlayFiles(files map[string]string) error {
	paths := make([]string, 0, len(files))
	for path := range files {
		paths = append(paths, path)
	}
	sort.Strings(paths)
	if err := os.MkdirAll("/run/files", 0o755); err != nil {
		return err
	}
	for _, path := range paths {
		if _, err := os.Stat(path); err != nil {
			continue // this kernel doesn't have it
		}
		source := "/run/files/" + strings.ReplaceAll(path, "/", "_")
		if err := os.WriteFile(source, []byte(files[path]), 0o644); err != nil {
			return err
		}
		if err := mount(source, path, "", syscall.MS_BIND, ""); err != nil {
			return err
		}
	}
	return nil
}

func mount(from, to, kind string, flags uintptr, data string) error {
	if err := syscall.Mount(from, to, kind, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", from, to, err)
	}
	return nil
}
