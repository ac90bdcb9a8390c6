package main

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

func appendOf(value string, invoked, ended int64, how outcome) event {
	return event{Event: "append", Value: value, Invoked: invoked, Ended: ended, Outcome: how}
}

func acked(value string, invoked, ended, offset int64) event {
	return appendOf(value, invoked, ended, outcome{Outcome: "acked", Offset: &offset})
}

func read(reader int, at, offset int64, values ...string) event {
	return event{Event: "read", Reader: reader, At: at, Offset: offset, Values: values}
}

func drained(end int64) event { return event{Event: "drained", End: end} }

var (
	ackedSomewhere = outcome{Outcome: "acked"}
	unknown        = outcome{Outcome: "unknown", Error: "timed out"}
	failed         = outcome{Outcome: "failed", Error: "too large"}
)

// told is all that the program says of a history that has only one partition, or why it does not come that far.
func told(t *testing.T, events []event, timeout time.Duration) (failures int, text string) {
	t.Helper()
	var out strings.Builder
	failures, err := report(partitionsOf(events), timeout, "", &out)
	if err != nil {
		t.Fatal(err)
	}
	return failures, out.String()
}

func TestHistoriesOfALog(t *testing.T) {
	three := []event{acked("0-0", 0, 10, 0), acked("0-1", 5, 15, 1), acked("1-0", 20, 30, 2)}
	with := func(more ...event) []event { return append(slices.Clone(three), more...) }
	whole := read(2, 90, 0, "0-0", "0-1", "1-0")
	many := make([]event, 0, 12)
	for i := range int64(10) {
		many = append(many, acked(fmt.Sprintf("0-%d", i), 0, 10, i))
	}
	cases := map[string][]event{
		"nothing is wrong":                                      with(whole, drained(3)),
		"many at once, as a batch is":                           append(many, read(0, 90, 0, values(many)...), drained(10)),
		"nothing was sent":                                      {drained(0)},
		"read before the producer heard of it":                  with(read(0, 7, 0, "0-0"), whole, drained(3)),
		"read in the microsecond in which it was sent":          with(read(0, 20, 2, "1-0"), whole, drained(3)),
		"a stale read":                                          with(read(0, 80, 0, "0-0"), whole, drained(3)),
		"sent when another was acknowledged, and before it":     {acked("0-0", 0, 10, 1), acked("1-0", 10, 20, 0), read(2, 90, 0, "1-0", "0-0"), drained(2)},
		"at once, and not in the order in which they were sent": {acked("0-0", 0, 20, 1), acked("1-0", 15, 30, 0), read(2, 90, 0, "1-0", "0-0"), drained(2)},
		"an unknown outcome that is in the log": with(appendOf("0-2", 40, 50, unknown), read(2, 90, 0, "0-0", "0-1", "1-0", "0-2"),
			drained(4)),
		"an unknown outcome that is in the log long after": {appendOf("0-0", 0, 10, unknown), acked("1-0", 40, 50, 0), read(2, 90, 0, "1-0", "0-0"), drained(2)},
		"an unknown outcome after the end was asked for":   with(appendOf("0-2", 6, 40, unknown), read(0, 95, 3, "0-2"), whole, drained(3)),
		"an unknown outcome that is not in the log":        with(appendOf("0-2", 40, 50, unknown), whole, drained(3)),
		"a failed append":                with(appendOf("0-2", 40, 50, failed), whole, drained(3)),
		"acknowledged without an offset": with(appendOf("0-2", 40, 50, ackedSomewhere), read(2, 90, 0, "0-0", "0-1", "1-0", "0-2"), drained(4)),
		"a fault and a refused read":     with(event{Event: "fault", Kind: "kill"}, event{Event: "refused", Error: "x"}, whole, drained(3)),
	}
	for name, events := range cases {
		if failures, text := told(t, events, time.Minute); failures != 0 {
			t.Errorf("%s:\n%s", name, text)
		}
	}
}

func TestHistoriesOfNoLog(t *testing.T) {
	three := []event{acked("0-0", 0, 10, 0), acked("0-1", 5, 15, 1), acked("1-0", 20, 30, 2)}
	with := func(more ...event) []event { return append(slices.Clone(three), more...) }
	whole := read(2, 90, 0, "0-0", "0-1", "1-0")
	cases := []struct {
		name   string
		events []event
		// In the explanation.
		says string
	}{
		{"two have changed places", with(read(2, 90, 0, "0-1", "0-0", "1-0"), drained(3)), "offset 0 has 0-0, and it saw 0-1"},
		{"one was told another's offset", []event{acked("0-0", 0, 10, 0), acked("1-0", 0, 10, 0), read(2, 90, 0, "0-0", "1-0"), drained(2)}, "its offset has"},
		{"the last acknowledged is lost", with(read(2, 90, 0, "0-0", "0-1"), drained(2)), "the log's end is said to be 2, from 31 us to 90 us: the log ends at 3"},
		{"one in the midst is lost", with(read(2, 90, 0, "0-0", "1-0"), drained(2)), "offset 1 has 0-1, and it saw 1-0"},
		{"lost, and acknowledged without an offset", with(appendOf("0-2", 40, 50, ackedSomewhere), whole, drained(3)), "no one has read it"},
		{"never appended", with(read(2, 90, 0, "0-0", "0-1", "1-0", "7-0"), drained(4)), "offset 3, where the log ends, is of no append that may have happened by then"},
		{"no value of a producer", with(read(2, 90, 0, "0-0", "0-1", "1-0", "foreign:x"), drained(4)), "it saw foreign:x at 3"},
		{"failed, yet read", with(appendOf("0-2", 40, 50, failed), read(2, 90, 0, "0-0", "0-1", "1-0", "0-2"), drained(4)), "it saw 0-2 at 3"},
		{"twice in the log", with(read(2, 90, 0, "0-0", "0-1", "1-0", "0-0"), drained(4)), "offset 3, where the log ends, is of no append"},
		{"twice in the log, of unknown outcome", with(appendOf("0-2", 40, 50, unknown), read(2, 90, 0, "0-0", "0-1", "1-0", "0-2", "0-2"), drained(5)),
			"offset 4, where the log ends, is of no append"},
		{"after its answer", []event{acked("0-0", 0, 10, 1), acked("1-0", 11, 20, 0), read(2, 90, 0, "1-0", "0-0"), drained(2)},
			"append of 0-0 at offset 1, acked, from 0 us to 10 us: the log ends at 0, before its offset"},
		{"after it was read", []event{appendOf("0-0", 0, 80, unknown), read(0, 10, 1, "0-0"), appendOf("1-0", 11, 80, unknown), read(2, 90, 0, "1-0", "0-0"),
			drained(2)}, "append of 0-0 at offset 1, unknown, from 0 us to 10 us: the log ends at 0, before its offset"},
		{"read before it was sent", with(read(0, 19, 2, "1-0"), whole, drained(3)), "the log ends at 2, and it saw 1-0 at 2"},
		{"read before it was sent, with an unknown outcome", []event{appendOf("0-0", 20, 30, unknown), read(0, 19, 0, "0-0"), drained(1)},
			"the log ends at 0, and it saw 0-0 at 0"},
		{"two readers, two values", with(read(0, 80, 1, "1-0"), whole, drained(3)), "offset 1 has 0-1, and it saw 1-0"},
		{"another partition's value", with(event{Event: "append", Partition: 1, Value: "0-2", Ended: 9, Outcome: unknown}, event{Event: "drained", Partition: 1},
			read(2, 90, 0, "0-0", "0-1", "1-0", "0-2"), drained(4)), "it saw 0-2 at 3"},
		{"not drained", with(whole), "no reader went through all of it"},
		{"drained, but for what no one read", with(whole, drained(4)), "no one has read offset 3"},
		{"the beginning is gone", with(read(2, 90, 1, "0-1", "1-0"), drained(3)), "no one has read offset 0"},
		{"sent twice", with(acked("0-0", 40, 50, 3), whole, drained(3)), "0-0 was sent twice"},
	}
	for _, c := range cases {
		failures, text := told(t, c.events, time.Minute)
		if failures != 1 || !strings.Contains(text, c.says) {
			t.Errorf("%s: %d failures, and not the words %q:\n%s", c.name, failures, c.says, text)
		}
	}
}

func values(appends []event) []string {
	var all []string
	for _, e := range appends {
		all = append(all, e.Value)
	}
	return all
}

// aLog makes the history of a correct log: each append takes effect at one instant, in turn, and producers do not wait for answers.
func aLog(random *rand.Rand, appends int, apart, longest int64) []event {
	var events []event
	var log []string
	var instants []int64
	for turn := range appends {
		instant := longest + int64(turn)*apart
		value := fmt.Sprintf("%d-%d", random.IntN(8), turn)
		e := appendOf(value, instant-random.Int64N(longest+1), instant+random.Int64N(longest+1), outcome{})
		offset := int64(len(log))
		inLog := true
		switch random.IntN(12) {
		case 0:
			e.Outcome, inLog = failed, false
		case 1:
			e.Outcome, inLog = unknown, false
		case 2:
			e.Outcome = unknown
		case 3:
			e.Outcome = ackedSomewhere
		default:
			e.Outcome = outcome{Outcome: "acked", Offset: &offset}
		}
		events = append(events, e)
		if inLog {
			log, instants = append(log, value), append(instants, instant)
		}
	}
	// Two go along, and one reads all of it at the end.
	end := longest + int64(appends)*apart + longest + 1
	for reader := range 3 {
		for from := 0; from < len(log); {
			to := min(len(log), from+1+random.IntN(3))
			if reader == 2 {
				to = len(log)
			}
			at := instants[to-1] + random.Int64N(longest+1)
			if reader == 2 {
				at = end
			}
			events = append(events, read(reader, at, int64(from), log[from:to]...))
			from = to
		}
	}
	return append(events, drained(int64(len(log))))
}

// spoil changes a history somehow, which may leave it a log's. All of it has been read before and after.
func spoil(random *rand.Rand, events []event) {
	pick := func(kind string) *event {
		var all []*event
		for i := range events {
			if events[i].Event == kind {
				all = append(all, &events[i])
			}
		}
		if len(all) == 0 {
			return &event{}
		}
		return all[random.IntN(len(all))]
	}
	switch e, other := pick("append"), pick("append"); random.IntN(8) {
	case 0:
		e.Value, other.Value = other.Value, e.Value
	case 1:
		e.Outcome, other.Outcome = other.Outcome, e.Outcome
	case 2:
		e.Invoked = random.Int64N(e.Ended + 1)
	case 3:
		e.Ended = e.Invoked + random.Int64N(20)
	case 4:
		e.Outcome = []outcome{failed, unknown, ackedSomewhere}[random.IntN(3)]
	case 5:
		if r := pick("read"); len(r.Values) > 0 {
			r.Values = slices.Clone(r.Values)
			r.Values[random.IntN(len(r.Values))] = e.Value
		}
	case 6:
		if r := pick("read"); r.At > 0 {
			r.At = random.Int64N(r.At)
		}
	case 7:
		for i, r := range events {
			for j, value := range r.Values {
				if value == e.Value {
					events[i].Values = slices.Clone(events[i].Values)
					events[i].Values[j] = other.Value
				} else if value == other.Value {
					events[i].Values = slices.Clone(events[i].Values)
					events[i].Values[j] = e.Value
				}
			}
		}
	}
}

func TestCorrectLogsPass(t *testing.T) {
	for seed := range uint64(200) {
		random := rand.New(rand.NewPCG(seed, 0))
		events := aLog(random, random.IntN(60), random.Int64N(4), random.Int64N(15))
		if failures, text := told(t, events, time.Minute); failures != 0 {
			t.Fatalf("seed %d: %v\n%s", seed, events, text)
		}
	}
}

// asNoted is a history as it was noted, and nothing made of it: an append of unknown outcome may take effect whenever and wherever, a read lasts since the
// one before, and nothing is left out but what failed.
func asNoted(p *partition) []porcupine.Operation {
	var operations []porcupine.Operation
	add := func(what operation, call, end int64) {
		operations = append(operations, porcupine.Operation{Input: what, Call: call, Return: end})
	}
	for _, e := range p.appends {
		switch {
		case e.Outcome.Outcome == "unknown":
			add(&somewhere{e.Value}, e.Invoked, math.MaxInt64)
		case e.Outcome.Outcome == "acked" && e.Outcome.Offset == nil:
			add(&somewhere{e.Value}, e.Invoked, e.Ended)
		case e.Outcome.Outcome == "acked":
			add(&anAppend{e.Value, *e.Outcome.Offset, "acked"}, e.Invoked, e.Ended)
		}
	}
	before := map[int]int64{}
	reads := slices.Clone(p.reads)
	slices.SortStableFunc(reads, func(one, other event) int { return cmp.Compare(one.At, other.At) })
	for _, e := range reads {
		add(&aRead{e.Reader, e.Offset, e.Values}, before[e.Reader], e.At)
		before[e.Reader] = e.At
	}
	add(&aDrain{p.end}, p.settled+1, p.over)
	return operations
}

type somewhere struct{ value string }

func (s *somewhere) step(l *log) *log    { return l.append(s.value) }
func (s *somewhere) refusal(*log) string { return "" }
func (s *somewhere) String() string      { return "append of " + s.value }

func TestWhatIsMadeOfAHistoryHasItsVerdict(t *testing.T) {
	verdicts, cut := map[porcupine.CheckResult]int{}, 0
	for seed := range uint64(20_000) {
		random := rand.New(rand.NewPCG(seed, 1))
		events := aLog(random, 1+random.IntN(6), random.Int64N(6), random.Int64N(10))
		for range random.IntN(3) {
			spoil(random, events)
		}
		p := partitionsOf(events)[0]
		operations, err := p.operations()
		if err != nil {
			continue
		}
		// Cut wherever it can be.
		v := check(operations, 1, time.Now().Add(time.Minute))
		found := v.result
		cut += v.pieces - 1
		expected, _ := porcupine.CheckOperationsVerbose(modelFrom(newLog()), asNoted(p), time.Minute)
		verdicts[found]++
		if found != expected {
			t.Fatalf("seed %d: %s, as it was noted %s: %+v", seed, found, expected, events)
		}
	}
	if verdicts[porcupine.Ok] < 1000 || verdicts[porcupine.Illegal] < 1000 || cut < 1000 {
		t.Errorf("too few of a kind to show anything: %v, and %d cuts", verdicts, cut)
	}
}

func TestAHistoryIsCutOnlyWhereNothingIsUnderWay(t *testing.T) {
	random := rand.New(rand.NewPCG(0, 2))
	for _, busy := range []bool{false, true} {
		longest := int64(3)
		if busy {
			longest = 500
		}
		p := partitionsOf(aLog(random, 5000, 8, longest))[0]
		operations, err := p.operations()
		if err != nil {
			t.Fatal(err)
		}
		all := pieces(operations, shortestPiece)
		// The end is a piece of its own.
		if busy && len(all) > 2 || !busy && len(all) < 5 {
			t.Errorf("%d pieces, and busy is %v", len(all), busy)
		}
		if !slices.EqualFunc(slices.Concat(all...), operations, func(one, other porcupine.Operation) bool { return one.Input == other.Input }) {
			t.Error("the pieces are not the whole")
		}
		for i, piece := range all[1:] {
			if latest(all[i]) >= piece[0].Call {
				t.Errorf("piece %d begins at %d us, and the one before ends at %d us", i+1, piece[0].Call, latest(all[i]))
			}
		}
	}
}

func TestWhatIsWrongInALaterPieceIsFound(t *testing.T) {
	random := rand.New(rand.NewPCG(0, 3))
	events := aLog(random, 5000, 8, 3)
	for i := range events {
		if e := &events[i]; e.Event == "read" && e.Reader == 0 && e.Offset > 4000 {
			e.Values = []string{"8-0"}
			break
		}
	}
	failures, text := told(t, events, time.Minute)
	if failures != 1 || !strings.Contains(text, "it saw 8-0") {
		t.Error(text)
	}
}

// As many records as a soak of a minute has in a partition, with never an instant at which nothing is under way: all of it is one piece. Fewer if something is
// wrong: Porcupine's time grows with their square then.
func TestManyAtOnceTakeSeconds(t *testing.T) {
	random := rand.New(rand.NewPCG(0, 4))
	failures, text := told(t, aLog(random, 30000, 300, 20000), time.Minute)
	if failures != 0 {
		t.Error(text)
	}
	t.Log(text)
	events := aLog(random, 5000, 300, 20000)
	spoilt := slices.IndexFunc(events, func(e event) bool { return e.Event == "read" && e.Offset > 4000 })
	events[spoilt].Values = []string{"8-0"}
	failures, text = told(t, events, time.Minute)
	if failures != 1 || !strings.Contains(text, "it saw 8-0") {
		t.Error(text)
	}
	t.Log(text)
}

func TestATimeOutIsAFailureOfItsOwn(t *testing.T) {
	failures, text := told(t, aLog(rand.New(rand.NewPCG(0, 5)), 100, 3, 3), 1)
	if failures != 1 || !strings.Contains(text, "no verdict in 1ns") {
		t.Error(text)
	}
}

func TestALogHasWhatWasAppended(t *testing.T) {
	l := newLog()
	for i := range int64(300) {
		l = l.append(fmt.Sprint(i))
		for length := range i + 2 {
			before := l.upTo(length)
			if before.length != length || length > 0 && before.last != fmt.Sprint(length-1) {
				t.Fatalf("a log of %d, up to %d: %v", i+1, length, before)
			}
		}
	}
	again := l.upTo(150)
	for i := range int64(150) {
		again = again.append(fmt.Sprint(150 + i))
	}
	if !l.equal(again) || l.equal(l.before) || l.equal(again.before.append("other")) {
		t.Error("logs are equal whose records are not, or the other way round")
	}
}

func TestTheProgram(t *testing.T) {
	const history = `{"event":"append","value":"0-0","partition":0,"invoked":0,"ended":10,"outcome":{"outcome":"acked","offset":0}}
{"event":"append","value":"0-1","partition":0,"invoked":1,"ended":10,"outcome":{"outcome":"acked","offset":null}}
{"event":"append","value":"0-2","partition":0,"invoked":2,"ended":10,"outcome":{"outcome":"unknown","error":"timed out"}}
{"event":"append","value":"0-3","partition":0,"invoked":3,"ended":10,"outcome":{"outcome":"failed","error":"too large"}}
{"event":"fault","kind":"kill","brokers":[0,2],"from":1,"until":2}
{"event":"read","reader":1,"partition":0,"offset":0,"values":["0-0","0-1"],"at":20}
{"event":"refused","reader":1,"partition":0,"error":"out of range","at":21}
{"event":"drained","partition":0,"end":2}
`
	cases := []struct {
		name, history string
		arguments     []string
		code          int
		says          string
	}{
		{"a history of a log", history, nil, 0, "all 1 partitions are linearizable"},
		{"a spoilt history", strings.Replace(history, `"0-0","0-1"`, `"0-1","0-0"`, 1), []string{"--visualize", "picture.html"}, 1, "picture: picture.html"},
		{"no operations", "", nil, 1, "nothing was checked"},
		{"half a line", history[:150], nil, 1, "line 2: unexpected EOF"},
		{"an event of another kind", `{"event":"moved"}`, nil, 1, `line 1: the event "moved"`},
		{"an outcome of another kind", strings.Replace(history, "acked", "ACK", 1), nil, 1, `line 1: an append with the outcome "ACK"`},
		{"a field of another name", strings.Replace(history, `"at"`, `"when"`, 1), nil, 1, `line 6: json: unknown field "when"`},
		{"an append that ends before it begins", strings.Replace(history, `"invoked":0`, `"invoked":11`, 1), nil, 1, "line 1: the append of 0-0 ended"},
		{"a flag that there is not", history, []string{"--no-such"}, 2, "usage: e2e/linearizability [flags] HISTORY"},
		{"no file", history, []string{"one"}, 2, "usage: e2e/linearizability [flags] HISTORY"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			if err := os.WriteFile("history.jsonl", []byte(c.history), 0o600); err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			code := run(append(c.arguments, "history.jsonl"), &out, &out)
			if code != c.code || !strings.Contains(out.String(), c.says) {
				t.Errorf("%d, and not the words %q:\n%s", code, c.says, out.String())
			}
		})
	}
	picture := filepath.Join(t.TempDir(), "picture.html")
	path := filepath.Join(t.TempDir(), "history.jsonl")
	spoilt := strings.Replace(history, `"0-0","0-1"`, `"0-1","0-0"`, 1)
	if err := os.WriteFile(path, []byte(spoilt), 0o600); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	run([]string{"--visualize", picture, path}, &out, &out)
	page, err := os.ReadFile(picture)
	if err != nil || !strings.Contains(string(page), "read by reader 1 from offset 0 to 2: 0-1 0-0") {
		t.Errorf("%v: %d bytes", err, len(page))
	}
	out.Reset()
	if code := run([]string{filepath.Join(t.TempDir(), "none")}, &out, &out); code != 1 || !strings.Contains(out.String(), "no such file") {
		t.Errorf("%d: %s", code, out.String())
	}
}
