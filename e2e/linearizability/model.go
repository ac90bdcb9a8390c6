package main

import (
	"fmt"
	"strings"

	"github.com/anishathalye/porcupine"
)

// log is the state of Porcupine's model: all of a partition's records, as a list that begins with the last one. Nothing in it ever changes, so
// that a state costs one record more than the state before, however many of them Porcupine keeps. It has the values themselves, and not only
// how many there are: what was read is compared with what was appended, and nothing is taken from readers on trust.
type log struct {
	length int64
	last   string
	before *log
	// A shorter one, so chosen that any shorter one is found in logarithmic time (Myers, "An applicative random-access stack", 1983): a consumer
	// may be far behind.
	skip *log
}

func newLog() *log {
	empty := &log{}
	empty.skip = empty
	return empty
}

func (l *log) append(value string) *log {
	skip := l
	if far := l.skip; l.length-far.length == far.length-far.skip.length {
		skip = far.skip
	}
	return &log{l.length + 1, value, l, skip}
}

// upTo is the log as it was when it had that length.
func (l *log) upTo(length int64) *log {
	for l.length > length {
		if l.skip.length >= length {
			l = l.skip
		} else {
			l = l.before
		}
	}
	return l
}

// equal is soon done with two logs that are the same, too: all but their last few records is one list.
func (l *log) equal(other *log) bool {
	for l != other {
		if l.length != other.length || l.last != other.last {
			return false
		}
		l, other = l.before, other.before
	}
	return true
}

func (l *log) String() string {
	if l.length == 0 {
		return "no record"
	}
	return fmt.Sprintf("%d records, the last %s", l.length, l.last)
}

// operation is what someone did, and what came of it.
type operation interface {
	// step is the log after it, or nil if it can't happen to this one.
	step(*log) *log
	// refusal says why it can't happen to a log to which it can't.
	refusal(*log) string
	String() string
}

// nowhere is the offset of an append that has none. No log is so short.
const nowhere = -1

// anAppend puts a value at the end of the log, which is at that offset.
type anAppend struct {
	value   string
	offset  int64
	outcome string
}

func (a *anAppend) step(l *log) *log {
	if l.length != a.offset {
		return nil
	}
	return l.append(a.value)
}

func (a *anAppend) refusal(l *log) string {
	switch {
	case a.offset == nowhere:
		return "no one has read it, and each offset has another value"
	case l.length < a.offset:
		return fmt.Sprintf("the log ends at %d, before its offset", l.length)
	default:
		return fmt.Sprintf("its offset has %s", l.upTo(a.offset+1).last)
	}
}

func (a *anAppend) String() string {
	if a.offset == nowhere {
		return fmt.Sprintf("append of %s, %s", a.value, a.outcome)
	}
	return fmt.Sprintf("append of %s at offset %d, %s", a.value, a.offset, a.outcome)
}

// aRead finds these values in the log. There may be more after them: a read may be stale, never wrong.
type aRead struct {
	reader int
	offset int64
	values []string
}

func (r *aRead) end() int64 { return r.offset + int64(len(r.values)) }

func (r *aRead) step(l *log) *log {
	if l.length < r.end() {
		return nil
	}
	found := l.upTo(r.end())
	for i := len(r.values) - 1; i >= 0; i-- {
		if found.length == 0 || found.last != r.values[i] {
			return nil
		}
		found = found.before
	}
	return l
}

func (r *aRead) refusal(l *log) string {
	for i, value := range r.values {
		offset := r.offset + int64(i)
		if offset < 0 || offset >= l.length {
			return fmt.Sprintf("the log ends at %d, and it saw %s at %d", l.length, value, offset)
		}
		if has := l.upTo(offset + 1).last; has != value {
			return fmt.Sprintf("offset %d has %s, and it saw %s", offset, has, value)
		}
	}
	return ""
}

func (r *aRead) String() string {
	values := r.values
	if len(values) > 5 {
		values = append(values[:4:4], "...", values[len(values)-1])
	}
	return fmt.Sprintf("read by reader %d from offset %d to %d: %s", r.reader, r.offset, r.end(), strings.Join(values, " "))
}

// aDrain finds the log's end.
type aDrain struct{ end int64 }

func (d *aDrain) step(l *log) *log {
	if l.length != d.end {
		return nil
	}
	return l
}

func (d *aDrain) refusal(l *log) string { return fmt.Sprintf("the log ends at %d", l.length) }

func (d *aDrain) String() string {
	return fmt.Sprintf("drained: the log's end is said to be %d", d.end)
}

// modelFrom is Porcupine's model of a partition that has this log to begin with.
func modelFrom(begin *log) porcupine.Model {
	return porcupine.Model{
		Init: func() any { return begin },
		Step: func(state, input, _ any) (bool, any) {
			next := input.(operation).step(state.(*log))
			return next != nil, next
		},
		Equal:             func(one, other any) bool { return one.(*log).equal(other.(*log)) },
		DescribeOperation: func(input, _ any) string { return input.(operation).String() },
		DescribeState:     func(state any) string { return state.(*log).String() },
	}
}
