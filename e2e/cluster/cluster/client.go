package cluster

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"millrace.dev/e2e/cluster/plan"
)

// The first look at something comes soon, since most of it takes well under a second.
const lookPause = 100 * time.Millisecond

type client struct{ kubernetes.Interface }

// connect returns when the API server is ready.
func (c Cluster) connect(ctx context.Context) (*client, error) {
	api, err := c.client()
	if err != nil {
		return nil, err
	}
	err = eventually(apiLimit, func() error {
		if ctx.Err() != nil {
			return nil // somebody else has failed, and says so
		}
		return api.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
	return api, err
}

func (c Cluster) client() (*client, error) {
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		return nil, err
	}
	config.Timeout = 10 * time.Second
	api, err := kubernetes.NewForConfig(config)
	return &client{api}, err
}

func (c *client) nodesReady(ctx context.Context, count int) error {
	return eventually(nodesLimit, func() error {
		nodes, err := c.CoreV1().Nodes().List(ctx, meta.ListOptions{})
		if err != nil {
			return err
		}
		var notReady []string
		for _, node := range nodes.Items {
			// The taint goes a moment after the condition comes, and no pod is scheduled before.
			if ready, why := nodeReady(&node); !ready || len(node.Spec.Taints) > 0 {
				notReady = append(notReady, node.Name+" "+why)
			}
		}
		if len(nodes.Items) < count || len(notReady) > 0 {
			return fmt.Errorf("%d of %d nodes are registered; not ready: %s", len(nodes.Items), count, strings.Join(notReady, ", "))
		}
		return nil
	})
}

func nodeReady(node *core.Node) (bool, string) {
	for _, condition := range node.Status.Conditions {
		if condition.Type == core.NodeReady {
			return condition.Status == core.ConditionTrue, condition.Message
		}
	}
	return false, "no condition"
}

// probe proves, from a pod on each node, that names resolve and that a Service is reached.
func (c *client) probe(ctx context.Context, numbers []int) error {
	pods := c.CoreV1().Pods(meta.NamespaceSystem)
	return errors.Join(each(numbers, func(number int) error {
		name := "probe-" + plan.Node(number)
		// It may be there from an `up` that was interrupted.
		now := int64(0)
		remove := func() error {
			return pods.Delete(ctx, name, meta.DeleteOptions{GracePeriodSeconds: &now})
		}
		if err := remove(); err != nil && !apierrors.IsNotFound(err) {
			return err
		}
		// The namespace's service account comes a moment after the API server, and a probe that is being deleted goes after a moment.
		if err := eventually(probeLimit, func() error {
			_, err := pods.Create(ctx, probePod(name, plan.Node(number)), meta.CreateOptions{})
			return err
		}); err != nil {
			return err
		}
		err := eventually(probeLimit, func() error {
			pod, err := pods.Get(ctx, name, meta.GetOptions{})
			if err == nil && pod.Status.Phase != core.PodSucceeded {
				err = fmt.Errorf("pod %s is %s", name, pod.Status.Phase)
			}
			return err
		})
		if err != nil {
			return err // and the pod stays, to be looked at
		}
		return remove()
	})...)
}

func probePod(name, node string) *core.Pod {
	no := false
	return &core.Pod{
		ObjectMeta: meta.ObjectMeta{Name: name},
		Spec: core.PodSpec{
			NodeName:                     node,
			RestartPolicy:                core.RestartPolicyNever,
			AutomountServiceAccountToken: &no,
			Containers: []core.Container{{
				Name: "probe", Image: plan.PauseImage, ImagePullPolicy: core.PullNever,
				Args: []string{"reach", "kubernetes.default.svc.cluster.local:443"},
			}},
		},
	}
}
