// Checks a soak's history with Porcupine, a checker of linearizability that others wrote and use. Beside it there is our own (e2e/src/history), which
// is n log n because it knows what a log is, and finds more than this; but both its argument and its code are ours. Porcupine searches an order of all
// operations of a partition in which each takes effect at one instant between its invocation and its answer, and knows nothing but
// the model (model.go). What it gets of a history, and why that is sound, stands in history.go.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/anishathalye/porcupine"
)

const name = "e2e/linearizability"

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run returns 0 if each partition's history has an order, 1 if one has none or could not be checked, and 2 if the arguments are wrong.
func run(arguments []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(stderr)
	timeout := flags.Duration("timeout", 5*time.Minute, "fail if Porcupine has no verdict after this time")
	picture := flags.String("visualize", "", "if there is no order, write Porcupine's picture of that, an HTML page, to this `file`")
	flags.Usage = func() {
		fmt.Fprintf(stderr, "usage: %s [flags] HISTORY\nHISTORY is the history.jsonl of a run of `millrace-e2e soak --keep`.\n", name)
		flags.PrintDefaults()
	}
	switch err := flags.Parse(arguments); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case flags.NArg() != 1 || *timeout <= 0:
		flags.Usage()
		return 2
	}
	events, err := readHistory(flags.Arg(0))
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
		return 1
	}
	failed, err := report(partitionsOf(events), *timeout, *picture, stdout)
	if err == nil && failed > 0 {
		err = fmt.Errorf("%d partitions failed; see what our own checker says: millrace-e2e check %s", failed, flags.Arg(0))
	}
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
		return 1
	}
	return 0
}

// report checks one partition after the other, since each may take much memory, and returns how many failed. It explains the first that has no order.
func report(partitions []*partition, timeout time.Duration, picture string, out io.Writer) (failed int, err error) {
	if len(partitions) == 0 {
		return 0, errors.New("the history has no operations: nothing was checked; was it of a run that was stopped at its beginning?")
	}
	begun := time.Now()
	deadline := begun.Add(timeout)
	explained := false
	for _, p := range partitions {
		operations, err := p.operations()
		if err != nil {
			failed++
			fmt.Fprintf(out, "partition %d: not checked: %v\n", p.number, err)
			continue
		}
		begun := time.Now()
		v := check(operations, shortestPiece, deadline)
		fmt.Fprintf(out, "partition %d: %d operations (of %d appends and %d reads) in %d pieces, the longest of %d, %.2f s: ",
			p.number, len(operations), len(p.appends), len(p.reads), v.pieces, v.longest, time.Since(begun).Seconds())
		switch v.result {
		case porcupine.Ok:
			fmt.Fprintln(out, "linearizable")
			continue
		case porcupine.Unknown:
			fmt.Fprintf(out, "no verdict in %v; try again with a longer --timeout\n", timeout)
		case porcupine.Illegal:
			fmt.Fprintln(out, "NOT LINEARIZABLE")
		}
		failed++
		if v.result != porcupine.Illegal || explained {
			continue
		}
		explained = true
		for _, line := range v.explain() {
			fmt.Fprintf(out, "  %s\n", line)
		}
		if picture == "" {
			continue
		}
		if err := porcupine.VisualizePath(modelFrom(v.begin), v.info, picture); err != nil {
			return failed, fmt.Errorf("the picture can't be written: %w", err)
		}
		fmt.Fprintf(out, "  picture: %s\n", picture)
	}
	if failed == 0 {
		fmt.Fprintf(out, "all %d partitions are linearizable, as Porcupine finds in %.2f s\n", len(partitions), time.Since(begun).Seconds())
	}
	return failed, nil
}
