package cluster

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sync/errgroup"

	"millrace.dev/e2e/cluster/control"
	"millrace.dev/e2e/cluster/network"
	"millrace.dev/e2e/cluster/plan"
)

// How long each may take on a small, busy machine.
const (
	containerdLimit = time.Minute
	apiLimit        = 2 * time.Minute
	nodesLimit      = 3 * time.Minute
	probeLimit      = 2 * time.Minute
)

// Up brings up a cluster of that many nodes, or makes one whole that is there.
func (c Cluster) Up(ctx context.Context, nodes int) error {
	if nodes < 1 || nodes > plan.NodesMax {
		return fmt.Errorf("nodes: 1 to %d", plan.NodesMax)
	}
	if _, err := c.running(); err != nil {
		// The host may have been restarted, or an earlier start have failed.
		if err := c.Down(); err != nil {
			return err
		}
	}
	begin := time.Now()
	say := func(format string, arguments ...any) {
		fmt.Printf("%5.1f s  %s\n", time.Since(begin).Seconds(), fmt.Sprintf(format, arguments...))
	}
	if err := c.keepOwnImage(); err != nil {
		return err
	}
	if err := c.bootControl(); err != nil {
		return err
	}
	say("the control plane is started")

	numbers := c.nodes()
	for number := 1; number <= nodes; number++ {
		if !exists(c.Machine(plan.Node(number))) {
			numbers = append(numbers, number)
		}
	}
	boots, bootsCtx := errgroup.WithContext(ctx)
	for _, number := range numbers {
		boots.Go(func() error { return c.bootNode(number) })
	}
	var client *client
	boots.Go(func() (err error) {
		client, err = c.connect(bootsCtx)
		return err
	})
	if err := boots.Wait(); err != nil {
		return err
	}
	for _, number := range numbers {
		if err := c.NodeHeal(number); err != nil {
			return err
		}
	}
	say("the API server answers, %d nodes are started", len(numbers))
	if err := c.applyObjects(ctx); err != nil {
		return err
	}
	if err := client.nodesReady(ctx, len(numbers)); err != nil {
		return err
	}
	say("the nodes are ready")
	if err := client.probe(ctx, numbers); err != nil {
		return err
	}
	say("on each node a pod has resolved and reached the API server")
	return nil
}

// NodeStart is bootNode and NodeHeal.
func (c Cluster) NodeStart(number int) error {
	if err := c.bootNode(number); err != nil {
		return err
	}
	return c.NodeHeal(number)
}

// APIServerStart starts the API server that APIServerStop has stopped, and returns when it answers.
func (c Cluster) APIServerStart(ctx context.Context) error {
	if _, err := c.running(); err != nil {
		return err
	}
	if err := start(c.control(), control.Services()); err != nil {
		return err
	}
	_, err := c.connect(ctx)
	return err
}

// Down ends all that runs, and removes all that is there.
func (c Cluster) Down() error {
	for _, step := range []func() error{
		c.notAnothers,
		killAll,
		network.Unhost,
		removeGroups,
		// A namespace's mounts go shortly after its last process.
		func() error { return eventually(10*time.Second, func() error { return os.RemoveAll(c.State) }) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}
