// The launcher's command line; `run` builds and starts it.
package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"millrace.dev/e2e/cluster/cluster"
	"millrace.dev/e2e/cluster/plan"
	"millrace.dev/e2e/cluster/volumes"
)

func main() {
	// The machines outlive this process: what its caller had open, such as a locked file, must not live on in them.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		fmt.Fprintln(os.Stderr, "e2e/cluster: open files can't be kept from the machines:", err)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e/cluster:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	c := cluster.Cluster{}
	root := &cobra.Command{
		Use:               "run",
		Short:             "A real Kubernetes of several nodes on this machine",
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	var folder string
	root.PersistentFlags().StringVar(&folder, "folder", "", "where the programs and the cluster's state are")
	_ = root.PersistentFlags().MarkHidden("folder")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		absolute, err := filepath.Abs(folder)
		c.Folders = plan.Folders{Programs: filepath.Join(absolute, "bin"), State: filepath.Join(absolute, "state")}
		return err
	}
	root.AddCommand(up(&c), down(&c), status(&c), env(&c), load(&c), build(&c), node(&c), apiServer(&c), in(&c), provision())
	return root
}

func up(c *cluster.Cluster) *cobra.Command {
	nodes := 3
	up := &cobra.Command{
		Use: "up", Short: "Bring the cluster up, or make whole the one that is there", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			err := c.Exclusively(func() error { return c.Up(command.Context(), nodes) })
			if err != nil {
				return fmt.Errorf("%w\nlogs: %s/*/log", err, c.Machine(""))
			}
			fmt.Printf("\nexport KUBECONFIG=%s\n", c.Kubeconfig())
			fmt.Printf("kubectl and helm: %s\n", c.Programs)
			return nil
		},
	}
	up.Flags().IntVar(&nodes, "nodes", nodes, "worker nodes at least")
	return up
}

func down(c *cluster.Cluster) *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "End the cluster and remove all that it had", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return c.Exclusively(c.Down) },
	}
}

func status(c *cluster.Cluster) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Say what is on; fails unless all is", Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error { return c.Status(command.Context(), os.Stdout) },
	}
}

func env(c *cluster.Cluster) *cobra.Command {
	return &cobra.Command{
		Use: "env", Short: `Print what the shell needs: eval "$(e2e/cluster/run env)"`, Args: cobra.NoArgs,
		Run: func(*cobra.Command, []string) {
			fmt.Printf("export KUBECONFIG='%s' PATH='%s':\"$PATH\"\n", c.Kubeconfig(), c.Programs)
		},
	}
}

func load(c *cluster.Cluster) *cobra.Command {
	return &cobra.Command{
		Use: "load ARCHIVE...", Short: "Load images (docker-archives) into all nodes", Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, archives []string) error {
			return c.Exclusively(func() error {
				for _, archive := range archives {
					if err := c.Load(archive); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
}

func build(c *cluster.Cluster) *cobra.Command {
	return &cobra.Command{
		Use: "build FOLDER NAME ARCHIVE", Short: "Build an image, NAME as localhost/x:y, from a folder with a Containerfile",
		Args: cobra.ExactArgs(3),
		RunE: func(_ *cobra.Command, args []string) error { return c.Build(args[0], args[1], args[2]) },
	}
}

func node(c *cluster.Cluster) *cobra.Command {
	verbs := &cobra.Command{Use: "node", Short: "Break nodes, and mend them"}
	for _, verb := range []struct {
		use, short string
		do         func(number int) error
	}{
		{"kill", "Pull the plug: all on it ends at once", func(n int) error { return c.NodeKill(n) }},
		{"wipe", "Pull the plug and empty the disk", func(n int) error { return c.NodeWipe(n) }},
		{"start", "Turn it on (a new one too), resume it, heal it", func(n int) error { return c.NodeStart(n) }},
		{"heal", "Mend what cut did", func(n int) error { return c.NodeHeal(n) }},
		{"pause", "Stop each process on it, pods' too, where it stands", func(n int) error { return c.NodePause(n) }},
		{"resume", "Let them go on", func(n int) error { return c.NodeResume(n) }},
	} {
		verbs.AddCommand(&cobra.Command{
			Use: verb.use + " NODE...", Short: verb.short, Args: cobra.MinimumNArgs(1),
			RunE: func(_ *cobra.Command, names []string) error {
				return c.Exclusively(func() error {
					for _, name := range names {
						number, err := plan.NodeNumber(name)
						if err != nil {
							return err
						}
						if err := verb.do(number); err != nil {
							return err
						}
					}
					return nil
				})
			},
		})
	}
	verbs.AddCommand(cut(c))
	return verbs
}

func cut(c *cluster.Cluster) *cobra.Command {
	var from []string
	cut := &cobra.Command{
		Use: "cut NODE", Short: "Take its network cable out, or cut it off from some machines only", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			number, err := plan.NodeNumber(args[0])
			if err != nil {
				return err
			}
			return c.Exclusively(func() error {
				if len(from) == 0 {
					return c.NodeCut(number)
				}
				for _, name := range from {
					other, err := plan.MachineNumber(name)
					if err != nil {
						return err
					}
					if err := c.NodePart(number, other); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	cut.Flags().StringSliceVar(&from, "from", nil, "only from these: nodes, or `control`, where the API server and DNS are")
	return cut
}

func apiServer(c *cluster.Cluster) *cobra.Command {
	verbs := &cobra.Command{Use: "apiserver", Short: "Stop the API server, and start it"}
	verbs.AddCommand(
		&cobra.Command{
			Use: "stop", Short: "Kill it; all else runs on", Args: cobra.NoArgs,
			RunE: func(*cobra.Command, []string) error { return c.Exclusively(c.APIServerStop) },
		},
		&cobra.Command{
			Use: "start", Short: "Start it, and wait until it answers", Args: cobra.NoArgs,
			RunE: func(command *cobra.Command, _ []string) error {
				return c.Exclusively(func() error { return c.APIServerStart(command.Context()) })
			},
		},
	)
	return verbs
}

func in(c *cluster.Cluster) *cobra.Command {
	in := &cobra.Command{
		Use: "in NODE PROGRAM [ARGUMENT]...", Short: "Run a program of this machine with a node's network and the cluster's DNS",
		Args: cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			number, err := plan.NodeNumber(args[0])
			if err != nil {
				return err
			}
			return c.In(number, args[1:])
		},
	}
	in.Flags().SetInterspersed(false)
	return in
}

// provision is a service of the control machine.
func provision() *cobra.Command {
	return &cobra.Command{
		Use: "provision KUBECONFIG", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(command *cobra.Command, args []string) error {
			err := volumes.Run(command.Context(), args[0])
			if errors.Is(err, context.Canceled) {
				return nil
			}
			return err
		},
	}
}
