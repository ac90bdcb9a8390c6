package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"

	"github.com/anishathalye/porcupine"
)

// event is a line of a history, of whichever kind; e2e/src/history/event.rs says what they mean.
type event struct {
	Event     string
	Partition int
	// Of an append.
	Value          string
	Invoked, Ended int64
	Outcome        outcome
	// Of a read.
	Reader int
	Offset int64
	Values []string
	At     int64
	// Of a drained partition.
	End int64
	// Of what is not looked at here: a refused read, and a fault.
	Error, Kind string
	Brokers     []int
	From, Until int64
}

type outcome struct {
	Outcome string
	Offset  *int64
	Error   string
}

// readHistory refuses fields and events that it does not know, so that it can't silently miss what the soak writes one day.
func readHistory(path string) ([]event, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("history %w", err)
	}
	defer file.Close()
	decoder := json.NewDecoder(bufio.NewReaderSize(file, 1<<20))
	decoder.DisallowUnknownFields()
	var events []event
	for {
		var e event
		err := decoder.Decode(&e)
		if errors.Is(err, io.EOF) {
			return events, nil
		}
		if err == nil {
			err = e.known()
		}
		if err != nil {
			return nil, fmt.Errorf("history %s, line %d: %w", path, len(events)+1, err)
		}
		events = append(events, e)
	}
}

func (e *event) known() error {
	switch e.Event {
	case "append":
		switch e.Outcome.Outcome {
		case "acked", "failed", "unknown":
		default:
			return fmt.Errorf("an append with the outcome %q, which this program does not know", e.Outcome.Outcome)
		}
		if e.Ended < e.Invoked {
			return fmt.Errorf("the append of %s ended after %d us, before it was invoked, after %d us", e.Value, e.Ended, e.Invoked)
		}
	case "read", "drained", "refused", "fault":
	default:
		return fmt.Errorf("the event %q, which this program does not know", e.Event)
	}
	return nil
}

// partition is what was seen of one.
type partition struct {
	number  int
	appends []event
	reads   []event
	drained bool
	end     int64
	// When the last producer had its last answer, and when all was over; of all partitions, since it is then that each is asked for its end.
	settled, over int64
}

// partitionsOf has them in the order of their numbers.
func partitionsOf(events []event) []*partition {
	byNumber := map[int]*partition{}
	var settled, over int64
	for _, e := range events {
		if e.Event == "fault" || e.Event == "refused" {
			continue
		}
		p := byNumber[e.Partition]
		if p == nil {
			p = &partition{number: e.Partition}
			byNumber[e.Partition] = p
		}
		switch e.Event {
		case "append":
			p.appends = append(p.appends, e)
			settled = max(settled, e.Ended)
		case "read":
			p.reads = append(p.reads, e)
			over = max(over, e.At)
		case "drained":
			p.drained, p.end = true, e.End
		}
	}
	all := make([]*partition, 0, len(byNumber))
	for _, number := range slices.Sorted(maps.Keys(byNumber)) {
		p := byNumber[number]
		p.settled, p.over = settled, max(settled+1, over)
		all = append(all, p)
	}
	return all
}

// sight is where a value was seen, and when first.
type sight struct {
	offset int64
	at     int64
}

// operations is the history as Porcupine takes it, in the order of the invocations. Each change to what was noted leaves the verdict as it is:
// for each order of the operations that explains what was noted there is one for what Porcupine gets, and the other way round
// (TestWhatIsMadeOfAHistoryHasItsVerdict tries that on small histories).
//
//   - An append that was acknowledged lasts from its invocation to its answer, and names its offset: it can only be next when the log ends there.
//     Without this Porcupine would try all orders of what is under way at a time.
//   - If it was acknowledged without an offset, or its outcome is unknown, and someone has read its value, its offset is that of the value:
//     nothing else puts the value there, since each value is sent once.
//   - An append of unknown outcome might take effect at any time after its invocation. If it was read, it had by then.
//   - If it never was, it is left out. All offsets up to the end were read, with other values, so that in any order it would be after all that
//     was seen, where it changes nothing. This needs the whole log to be read, without which there is no verdict.
//   - One that was acknowledged without an offset, and that no one has read, has no place for the same reason, and there is no order.
//   - An append that failed is left out. Nothing else puts its value into the log: a read of it has no order.
//   - A read is noted when it had come; when it was asked for is not known, and does not matter. It may be stale, so it can take effect as soon as
//     all its values are in the log and, as a log only grows, at any time from then on. So if it can at all, it can at the instant at which it
//     came, and that is all it is given. Long intervals that are harmless would only have Porcupine try what is idle, and leave no instant
//     at which nothing is under way (see pieces).
//   - The end that the leader said was so at some instant after the last producer had its last answer. That is not in the same microsecond: the
//     leader was asked afterwards.
//
// Times are whole microseconds: what ends in the same one in which another begins may have been before it or after it. Porcupine's intervals include
// both ends, so the two have no order.
//
// Not looked at, since it is nothing about one log with atomic appends: the order of each producer's values, and that consumers see each offset once.
// `millrace-e2e check` does.
func (p *partition) operations() ([]porcupine.Operation, error) {
	if !p.drained {
		return nil, errors.New("no reader went through all of it at the end, so that what is lost can't be told; the history is of a run that was not finished")
	}
	seen, err := p.seen()
	if err != nil {
		return nil, err
	}
	var operations []porcupine.Operation
	add := func(what operation, call, end int64) {
		operations = append(operations, porcupine.Operation{Input: what, Call: call, Return: end})
	}
	sent := map[string]bool{}
	for _, e := range p.appends {
		if sent[e.Value] {
			return nil, fmt.Errorf("%s was sent twice, and each value may be only once; the history is not usable", e.Value)
		}
		sent[e.Value] = true
		sight, wasSeen := seen[e.Value]
		offset, end := int64(nowhere), e.Ended
		if wasSeen {
			offset = sight.offset
		}
		switch e.Outcome.Outcome {
		case "failed":
			continue
		case "acked":
			if e.Outcome.Offset != nil {
				offset = *e.Outcome.Offset
			}
		case "unknown":
			if !wasSeen {
				continue
			}
			// Not before it began, though, if it was read before that: the read then has no order.
			end = max(sight.at, e.Invoked)
		}
		add(&anAppend{e.Value, offset, e.Outcome.Outcome}, e.Invoked, end)
	}
	for _, e := range p.reads {
		add(&aRead{e.Reader, e.Offset, e.Values}, e.At, e.At)
	}
	add(&aDrain{p.end}, p.settled+1, p.over)
	slices.SortStableFunc(operations, func(one, other porcupine.Operation) int { return cmp.Compare(one.Call, other.Call) })
	return operations, nil
}

// seen is where the values are, for those who read them. If they contradict each other, any will do: there is no order then.
func (p *partition) seen() (map[string]sight, error) {
	seen := map[string]sight{}
	read := map[int64]bool{}
	end := p.end
	for _, e := range p.reads {
		for i, value := range e.Values {
			offset := e.Offset + int64(i)
			read[offset] = true
			end = max(end, offset+1)
			first, again := seen[value]
			if !again {
				first = sight{offset, e.At}
			}
			first.at = min(first.at, e.At)
			seen[value] = first
		}
	}
	for offset := range end {
		if !read[offset] {
			return nil, fmt.Errorf("its log ends at %d, and no one has read offset %d, so that what is lost can't be told", end, offset)
		}
	}
	return seen, nil
}

// pieces cuts a history where nothing is under way. All before such an instant is before all after it in any order, so each piece can have its order
// for itself, beginning with the log in which the one before ended. That log is the same for all of that piece's orders: each append has its offset.
// Porcupine keeps, for each step, which operations are done: its memory grows with the square of a piece's length.
func pieces(operations []porcupine.Operation, shortest int) [][]porcupine.Operation {
	var all [][]porcupine.Operation
	begin, busy := 0, int64(0)
	for i, operation := range operations {
		if operation.Call > busy && i-begin >= shortest {
			all = append(all, operations[begin:i])
			begin = i
		}
		busy = max(busy, operation.Return)
	}
	return append(all, operations[begin:])
}
