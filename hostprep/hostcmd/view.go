package hostcmd

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"platter/hostprep"
)

// jsonStep is a step's result for programs.
type jsonStep struct {
	Step     string           `json:"step"`
	Outcome  hostprep.Outcome `json:"outcome"`
	TookMS   int64            `json:"took_ms"`
	Findings []jsonFinding    `json:"findings"`
	Reason   string           `json:"reason,omitempty"`
	Next     string           `json:"next,omitempty"`
}

type jsonFinding struct {
	What   string `json:"what"`
	OK     bool   `json:"ok"`
	Is     string `json:"is"`
	Want   string `json:"should_be"`
	Why    string `json:"why,omitempty"`
	Source string `json:"source,omitempty"`
	Boot   bool   `json:"reboot,omitempty"`
	Person bool   `json:"person,omitempty"`
}

// Marshal is the results of checks as 'host check -o json' prints them.
func Marshal(results []hostprep.Result) ([]byte, error) {
	out := []jsonStep{}
	for _, r := range results {
		s := jsonStep{Step: r.Step, Outcome: r.Outcome, TookMS: r.Took.Milliseconds(), Findings: []jsonFinding{}, Next: r.Next}
		if r.Reason != nil {
			s.Reason = r.Reason.Error()
		}
		for _, f := range r.Findings {
			s.Findings = append(s.Findings, jsonFinding(f))
		}
		out = append(out, s)
	}
	return json.Marshal(out)
}

// Unmarshal reads what Marshal wrote, maybe on another host.
func Unmarshal(b []byte) ([]hostprep.Result, error) {
	var in []jsonStep
	if err := json.Unmarshal(b, &in); err != nil {
		return nil, fmt.Errorf("results of checks: %w", err)
	}
	out := []hostprep.Result{}
	for _, s := range in {
		r := hostprep.Result{Step: s.Step, Outcome: s.Outcome, Took: time.Duration(s.TookMS) * time.Millisecond, Next: s.Next}
		if s.Outcome == hostprep.Failed {
			r.Reason = errors.New(s.Reason)
		}
		for _, f := range s.Findings {
			r.Findings = append(r.Findings, hostprep.Finding(f))
		}
		out = append(out, r)
	}
	return out, nil
}

func writeJSON(w io.Writer, results []hostprep.Result) error {
	b, err := Marshal(results)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := json.Indent(&out, b, "", "  "); err != nil {
		return err
	}
	out.WriteByte('\n')
	_, err = out.WriteTo(w)
	return err
}

// table collects rows under a heading; it draws nothing without rows.
type table struct {
	head string
	rows []string
	step string
}

// add adds a row of a step, whose name stands on its first row only.
func (t *table) add(step string, cells ...string) {
	name := step
	if step == t.step {
		name = ""
	}
	t.step = step
	for i, c := range cells {
		cells[i] = or(oneLine(c))
	}
	t.rows = append(t.rows, name+"\t"+strings.Join(cells, "\t")+"\t")
}

func (t *table) write(w io.Writer) error {
	if len(t.rows) == 0 {
		return nil
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, t.head)
	for _, r := range t.rows {
		fmt.Fprintln(tw, r)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w)
	return err
}

// WriteCheck lists what deviates, for people.
func WriteCheck(w io.Writer, results []hostprep.Result) error {
	t := table{head: "STEP\tWHAT\tIS\tSHOULD BE\tWHY\tSOURCE\t"}
	deviate, looked, reboot := 0, 0, 0
	for _, r := range results {
		looked += len(r.Findings)
		for _, f := range r.Deviations() {
			deviate++
			want := f.Want
			if f.Boot {
				reboot++
				want += " (after a reboot)"
			}
			t.add(r.Step, f.What, f.Is, want, f.Why, f.Source)
		}
	}
	if err := t.write(w); err != nil {
		return err
	}
	bad := writeFailures(w, results)
	switch {
	case deviate == 0 && bad == 0:
		fmt.Fprintf(w, "The host is as it should be: %d steps, %d things looked at.\n", len(results), looked)
	case deviate == reboot && bad == 0:
		fmt.Fprintf(w, "%d of %d things wait for a reboot.\n", deviate, looked)
	case deviate > 0:
		fmt.Fprintf(w, "%d of %d things deviate. 'host apply' puts right what can be put right without a person.\n", deviate, looked)
	}
	return nil
}

// writeApply lists what was changed and how it went.
func writeApply(w io.Writer, results []hostprep.Result) error {
	t := table{head: "STEP\tWHAT\tWAS\tIS\tRESULT\t"}
	changed, reboot, left := 0, 0, 0
	for _, r := range results {
		was := map[string]hostprep.Finding{}
		for _, f := range r.Before {
			was[f.What] = f
		}
		for _, f := range r.Findings {
			before, known := was[f.What]
			switch {
			case f.OK && (!known && r.Before == nil || known && before.OK):
			case f.OK:
				changed++
				t.add(r.Step, f.What, before.Is, f.Is, "changed")
			case f.Boot:
				reboot++
				t.add(r.Step, f.What, before.Is, f.Is, "in effect after a reboot")
			default:
				left++
				t.add(r.Step, f.What, before.Is, f.Is, "should be "+f.Want)
			}
		}
	}
	if err := t.write(w); err != nil {
		return err
	}
	bad := writeFailures(w, results)
	switch {
	case reboot > 0:
		fmt.Fprintf(w, "%d changed, %d more after a reboot: reboot the host, then 'host check'.\n", changed, reboot)
	case changed > 0:
		fmt.Fprintf(w, "%d changed.\n", changed)
	case bad == 0 && left == 0:
		fmt.Fprintln(w, "Nothing had to be changed.")
	}
	if bad == 0 && left > 0 {
		fmt.Fprintf(w, "%d for a person to put right, see above.\n", left)
	}
	return nil
}

// writeFailures says what failed and what to do next; it returns how many.
func writeFailures(w io.Writer, results []hostprep.Result) int {
	n := 0
	for _, r := range results {
		if r.Outcome != hostprep.Failed {
			continue
		}
		n++
		fmt.Fprintf(w, "%s failed: %s.", r.Step, strings.TrimSuffix(oneLine(r.Reason.Error()), "."))
		if r.Next != "" {
			fmt.Fprintf(w, " %s.", strings.TrimSuffix(r.Next, "."))
		}
		fmt.Fprintln(w)
	}
	return n
}

func oneLine(s string) string {
	return strings.ReplaceAll(strings.ReplaceAll(strings.TrimSpace(s), "\n", "; "), "\t", " ")
}

func or(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
