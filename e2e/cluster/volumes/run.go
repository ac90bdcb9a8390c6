package volumes

import (
	"context"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"

	"millrace.dev/e2e/cluster/plan"
)

// Run provides volumes for the claims of one cluster, until the context ends.
func Run(ctx context.Context, kubeconfig string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	// Many claims may come at a time.
	config.QPS, config.Burst = 100, 100
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	if err := grow(ctx, client); err != nil {
		return err
	}
	controller.NewProvisionController(ctx, client, plan.Provisioner, provisioner{},
		controller.LeaderElection(false), // there is only one
	).Run(ctx)
	return nil
}
