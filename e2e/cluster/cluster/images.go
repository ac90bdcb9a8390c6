package cluster

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"millrace.dev/e2e/cluster/image"
	"millrace.dev/e2e/cluster/plan"
)

// images is where the cluster keeps what it was given, for nodes that come later or lose their disk.
func (c Cluster) images() string { return filepath.Join(c.State, "images") }

func (c Cluster) keepOwnImage() error {
	if err := os.MkdirAll(c.images(), 0o755); err != nil {
		return err
	}
	return image.Archive(filepath.Join(c.images(), "own.tar"), plan.PauseImage, c.Program("pod"), "pause")
}

// Load loads an image, a docker-archive, into all nodes.
func (c Cluster) Load(archive string) error {
	if _, err := c.running(); err != nil {
		return err
	}
	kept := filepath.Join(c.images(), filepath.Base(archive))
	if err := copyFile(archive, kept); err != nil {
		return err
	}
	var loads errgroup.Group
	for _, number := range c.nodes() {
		node := c.machine(plan.Node(number))
		if node.Pid() == 0 {
			fmt.Printf("%s is off; it gets the image if its disk is wiped, or when it is loaded again\n", node.Name)
			continue
		}
		loads.Go(func() error { return image.Load(node, kept) })
	}
	return loads.Wait()
}

// Build builds an image and writes it as an archive.
func (c Cluster) Build(folder, name, archive string) error {
	// Beside the programs, since its layers are a cache too.
	return image.Build(filepath.Join(filepath.Dir(c.Programs), "images"), folder, name, archive)
}

func copyFile(from, to string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.Create(to)
	if err != nil {
		return err
	}
	if _, err := io.Copy(target, source); err != nil {
		target.Close()
		return err
	}
	return target.Close()
}
