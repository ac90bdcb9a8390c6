package image

import (
	"fmt"
	"os"
	"os/exec"
)

// Build builds an image from a folder with a Containerfile or Dockerfile, and writes it as a docker-archive. The builder keeps its layers in store.
func Build(store, folder, name, archive string) error {
	if err := os.RemoveAll(archive); err != nil { // the builder refuses to write over it
		return err
	}
	// Its network, which is not used, has a folder of the host by default.
	settings := store + "/containers.conf"
	if err := os.MkdirAll(store, 0o755); err != nil {
		return err
	}
	text := fmt.Sprintf("[network]\nnetwork_config_dir = %q\n", store+"/network")
	if err := os.WriteFile(settings, []byte(text), 0o644); err != nil {
		return err
	}
	// Neither of these needs more than a container has: no namespaces of its own, no mounts in the kernel.
	builder := []string{"--root", store + "/layers", "--runroot", store + "/run", "--storage-driver", "vfs"}
	steps := [][]string{
		append(builder, "build", "--isolation", "chroot", "--layers", "--tag", name, folder),
		append(builder, "push", name, fmt.Sprintf("docker-archive:%s:%s", archive, name)),
	}
	for _, arguments := range steps {
		command := exec.Command("buildah", arguments...)
		command.Env = append(os.Environ(), "CONTAINERS_CONF="+settings)
		command.Stdout, command.Stderr = os.Stderr, os.Stderr
		if err := command.Run(); err != nil {
			return fmt.Errorf("buildah: %w", err)
		}
	}
	return nil
}
