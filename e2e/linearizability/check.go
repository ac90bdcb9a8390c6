package main

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"
)

// Pieces of fewer operations would cost more than they save, and show less around what is wrong.
const shortestPiece = 1000

// verdict is Porcupine's, of one partition.
type verdict struct {
	result porcupine.CheckResult
	// How many there are, and how many operations the longest has.
	pieces, longest int
	// If there is no order, or none was found in time: the piece that lacks one, the log in which it begins, and what Porcupine knows of it.
	piece []porcupine.Operation
	begin *log
	info  porcupine.LinearizationInfo
}

// check asks Porcupine, and gives up at the deadline.
func check(operations []porcupine.Operation, shortest int, deadline time.Time) verdict {
	all := pieces(operations, shortest)
	v := verdict{result: porcupine.Ok, pieces: len(all), begin: newLog()}
	for _, piece := range all {
		v.longest = max(v.longest, len(piece))
	}
	for _, piece := range all {
		toLanes(piece)
		// For Porcupine, 0 is for ever.
		left := max(time.Until(deadline), 1)
		v.result, v.info = porcupine.CheckOperationsVerbose(modelFrom(v.begin), piece, left)
		v.piece = piece
		if v.result != porcupine.Ok {
			return v
		}
		v.begin = after(v.begin, piece, v.order())
	}
	return v
}

// order is the longest one that Porcupine has found, by the operations' indices in the piece.
func (v verdict) order() []int {
	var longest []int
	for _, order := range v.info.PartialLinearizations()[0] {
		if len(order) > len(longest) {
			longest = order
		}
	}
	return longest
}

func after(l *log, piece []porcupine.Operation, order []int) *log {
	for _, index := range order {
		l = piece[index].Input.(operation).step(l)
	}
	return l
}

// toLanes gives operations that overlap to different clients, for Porcupine's picture, in which a client does one thing at a time.
func toLanes(piece []porcupine.Operation) {
	var busy []int64
	for i, operation := range piece {
		lane := slices.IndexFunc(busy, func(until int64) bool { return until < operation.Call })
		if lane < 0 {
			lane = len(busy)
			busy = append(busy, math.MinInt64)
		}
		busy[lane] = operation.Return
		piece[i].ClientId = lane
	}
}

// explain says in a few lines which operations have no place in any order.
func (v verdict) explain() []string {
	const shown = 5
	order := v.order()
	l := after(v.begin, v.piece, order)
	done := map[int]bool{}
	for _, index := range order {
		done[index] = true
	}
	var left []porcupine.Operation
	for index, operation := range v.piece {
		if !done[index] {
			left = append(left, operation)
		}
	}
	slices.SortStableFunc(left, func(one, other porcupine.Operation) int { return cmp.Compare(one.Return, other.Return) })
	lines := []string{
		fmt.Sprintf("after %d of the %d operations from %d us to %d us the log has %s; there is no order for what is left:",
			len(order), len(v.piece), v.piece[0].Call, latest(v.piece), l),
	}
	// The first to end had to be next, at the latest; what else is shown could have been before it, or is what the log lacks.
	first := left[0]
	lacking := true
	for _, what := range left {
		put, is := what.Input.(*anAppend)
		isNext := is && put.offset == l.length
		var why string
		switch {
		case what.Call > first.Return:
			why = ": this began only after the first of these had ended"
		case what.Input.(operation).step(l) == nil:
			why = ": " + what.Input.(operation).refusal(l)
		}
		if isNext || what.Call <= first.Return && why != "" && len(lines) <= shown {
			lines = append(lines, fmt.Sprintf("%s, from %d us to %d us%s", what.Input, what.Call, what.Return, why))
		}
		lacking = lacking && !isNext
	}
	if lacking {
		lines = append(lines, fmt.Sprintf("offset %d, where the log ends, is of no append that may have happened by then", l.length))
	}
	return lines
}

func latest(piece []porcupine.Operation) int64 {
	var latest int64
	for _, operation := range piece {
		latest = max(latest, operation.Return)
	}
	return latest
}
