package cluster

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"os/exec"

	"millrace.dev/e2e/cluster/filled"
	"millrace.dev/e2e/cluster/plan"
)

//go:embed objects.yaml
var objects string

// applyObjects makes what a cluster has from the start.
func (c Cluster) applyObjects(ctx context.Context) error {
	manifests, err := filled.Template(objects, map[string]string{
		"DNSServer":    plan.ControlAddress,
		"DNSService":   plan.DNSServiceAddr,
		"Provisioner":  plan.Provisioner,
		"StorageClass": plan.StorageClass,
	})
	if err != nil {
		return err
	}
	apply := exec.CommandContext(ctx, c.Program("kubectl"), "--kubeconfig", c.Kubeconfig(), "apply", "--server-side", "--filename", "-")
	apply.Stdin = bytes.NewReader(manifests)
	if output, err := apply.CombinedOutput(); err != nil {
		return fmt.Errorf("kubectl apply: %w\n%s", err, output)
	}
	return nil
}
