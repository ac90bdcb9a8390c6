package volumes

import (
	"context"
	"fmt"
	"os"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/retry"

	"millrace.dev/e2e/cluster/plan"
)

const provisionerAnnotation = "volume.kubernetes.io/storage-provisioner"

// grow lets volumes follow what their claims ask for.
func grow(ctx context.Context, client kubernetes.Interface) error {
	factory := informers.NewSharedInformerFactory(client, 0)
	informer := factory.Core().V1().PersistentVolumeClaims().Informer()
	look := func(object any) {
		claim, ok := object.(*core.PersistentVolumeClaim)
		if !ok || claim.Status.Phase != core.ClaimBound || claim.Annotations[provisionerAnnotation] != plan.Provisioner {
			return
		}
		asked, has := claim.Spec.Resources.Requests[core.ResourceStorage], claim.Status.Capacity[core.ResourceStorage]
		if asked.Cmp(has) <= 0 {
			return
		}
		// Others write to the same objects.
		err := retry.RetryOnConflict(retry.DefaultBackoff, func() error { return growClaim(ctx, client, claim.Namespace, claim.Name) })
		if err != nil {
			fmt.Fprintf(os.Stderr, "growing %s/%s: %v\n", claim.Namespace, claim.Name, err)
		}
	}
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    look,
		UpdateFunc: func(_, object any) { look(object) },
	})
	factory.Start(ctx.Done())
	return err
}

func growClaim(ctx context.Context, client kubernetes.Interface, namespace, name string) error {
	claim, err := client.CoreV1().PersistentVolumeClaims(namespace).Get(ctx, name, meta.GetOptions{})
	if err != nil {
		return err
	}
	volume, err := client.CoreV1().PersistentVolumes().Get(ctx, claim.Spec.VolumeName, meta.GetOptions{})
	if err != nil {
		return err
	}
	asked := claim.Spec.Resources.Requests[core.ResourceStorage]
	volume.Spec.Capacity[core.ResourceStorage] = asked
	if _, err := client.CoreV1().PersistentVolumes().Update(ctx, volume, meta.UpdateOptions{}); err != nil {
		return err
	}
	claim.Status.Capacity[core.ResourceStorage] = asked
	_, err = client.CoreV1().PersistentVolumeClaims(namespace).UpdateStatus(ctx, claim, meta.UpdateOptions{})
	return err
}
