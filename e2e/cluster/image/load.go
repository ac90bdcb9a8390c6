package image

import (
	"os"
	"strings"

	"millrace.dev/e2e/cluster/machine"
)

// Load imports an archive into a node.
func Load(node machine.Machine, path string) error {
	archive, err := os.Open(path)
	if err != nil {
		return err
	}
	defer archive.Close()
	// As its input: the path may be one that means something else in the machine.
	_, err = node.Run(archive, "ctr", "--namespace", "k8s.io", "images", "import", "-")
	return err
}

// Has tells whether a node has an image.
func Has(node machine.Machine, name string) (bool, error) {
	names, err := node.Run(nil, "ctr", "--namespace", "k8s.io", "images", "list", "--quiet")
	if err != nil {
		return false, err
	}
	for _, line := range strings.Fields(names) {
		if line == name {
			return true, nil
		}
	}
	return false, nil
}
