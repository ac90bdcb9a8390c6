// Package volumes provides persistent volumes: each is a folder on the node that its first pod was scheduled to, and bound to that node. What a
// volume holds is as large as the host's disk allows; its capacity is a number that nobody enforces, so it may grow by changing the number.
package volumes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"

	"millrace.dev/e2e/cluster/plan"
)

type provisioner struct{}

// Provision makes the folder.
func (provisioner) Provision(_ context.Context, options controller.ProvisionOptions) (*core.PersistentVolume, controller.ProvisioningState, error) {
	if options.SelectedNodeName == "" {
		return nil, controller.ProvisioningFinished, fmt.Errorf("the storage class must have volumeBindingMode: WaitForFirstConsumer")
	}
	node := options.SelectedNodeName
	folder := folderOf(node, options.PVName)
	if err := os.MkdirAll(folder, 0o777); err != nil {
		return nil, controller.ProvisioningFinished, err
	}
	// Despite the umask: who may write is the pod's business (fsGroup).
	if err := os.Chmod(folder, 0o777); err != nil {
		return nil, controller.ProvisioningFinished, err
	}
	return &core.PersistentVolume{
		ObjectMeta: meta.ObjectMeta{Name: options.PVName},
		Spec: core.PersistentVolumeSpec{
			PersistentVolumeReclaimPolicy: *options.StorageClass.ReclaimPolicy,
			AccessModes:                   options.PVC.Spec.AccessModes,
			Capacity:                      core.ResourceList{core.ResourceStorage: options.PVC.Spec.Resources.Requests[core.ResourceStorage]},
			// Not hostPath, which knows no fsGroup.
			PersistentVolumeSource: core.PersistentVolumeSource{
				Local: &core.LocalVolumeSource{Path: filepath.Join(plan.Volumes, options.PVName)},
			},
			NodeAffinity: onlyOn(node),
		},
	}, controller.ProvisioningFinished, nil
}

// Delete removes the folder with all that it holds.
func (provisioner) Delete(_ context.Context, volume *core.PersistentVolume) error {
	node, err := nodeOf(volume)
	if err != nil {
		return err
	}
	return os.RemoveAll(folderOf(node, volume.Name))
}

// folderOf is a volume's folder as the control machine sees it; the node sees its own volumes only.
func folderOf(node, volume string) string { return filepath.Join(plan.Volumes, node, volume) }

func onlyOn(node string) *core.VolumeNodeAffinity {
	return &core.VolumeNodeAffinity{Required: &core.NodeSelector{NodeSelectorTerms: []core.NodeSelectorTerm{{
		MatchExpressions: []core.NodeSelectorRequirement{{
			Key: core.LabelHostname, Operator: core.NodeSelectorOpIn, Values: []string{node},
		}},
	}}}}
}

func nodeOf(volume *core.PersistentVolume) (string, error) {
	if affinity := volume.Spec.NodeAffinity; affinity != nil && affinity.Required != nil {
		for _, term := range affinity.Required.NodeSelectorTerms {
			for _, expression := range term.MatchExpressions {
				if expression.Key == core.LabelHostname && len(expression.Values) == 1 {
					return expression.Values[0], nil
				}
			}
		}
	}
	return "", fmt.Errorf("volume %s names no node", volume.Name)
}
