// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/kata-v2/kata/sandbox/ledger"
)

// States of a pod in "kata-ctl ps".
const (
	Running    = "running"
	Dead       = "dead"       // its shim was killed; gc removes what it left
	Unreadable = "unreadable" // its ledger is damaged
)

// Pod is one line of "kata-ctl ps"; with --json the command prints an array of them.
type Pod struct {
	ID        string    `json:"id"`
	Namespace string    `json:"namespace"`
	Key       string    `json:"key"`
	Bundle    string    `json:"bundle"`
	ShimPID   int       `json:"shim_pid"`
	VMMPID    int       `json:"vmm_pid"` // 0 when none runs
	Created   time.Time `json:"created"`
	AgeSec    int64     `json:"age_seconds"`
	State     string    `json:"state"`
	Build     string    `json:"build"`
}

// Pods lists the pods that have a ledger below root.
func Pods(root string, now time.Time) ([]Pod, error) {
	list, err := ledger.List(root)
	if err != nil {
		return nil, err
	}
	pods := make([]Pod, 0, len(list))
	for _, i := range list {
		p := Pod{ID: i.Meta.Sandbox, Namespace: i.Meta.Namespace, Key: i.Key, Bundle: i.Meta.Bundle,
			ShimPID: i.Meta.Shim.PID, VMMPID: vmmPID(i), Created: i.Meta.Created, State: Dead, Build: i.Meta.Build}
		if !p.Created.IsZero() {
			p.AgeSec = int64(now.Sub(p.Created) / time.Second)
		}
		switch {
		case i.Err != nil:
			p.State = Unreadable
		case i.Alive:
			p.State = Running
		}
		pods = append(pods, p)
	}
	return pods, nil
}

// vmmPID is the process that the ledger calls qemu, if it still runs.
func vmmPID(i ledger.Info) int {
	for _, e := range i.Entries {
		if e.Kind != ledger.KindProcess || e.Name != "qemu" {
			continue
		}
		if start, err := ledger.StartTime(e.PID); err == nil && start == e.Start {
			return e.PID
		}
	}
	return 0
}

func (o *options) ps(_ context.Context, w io.Writer) error {
	root, err := o.stateRoot()
	if err != nil {
		return err
	}
	pods, err := Pods(root, time.Now())
	if err != nil {
		return err
	}
	if o.json {
		return printJSON(w, pods)
	}
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tNAMESPACE\tSHIM\tVMM\tAGE\tSTATE")
	for _, p := range pods {
		id := p.ID
		if id == "" {
			id = "(" + p.Key + ")"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", id, dash(p.Namespace), pid(p.ShimPID), pid(p.VMMPID), age(p), p.State)
	}
	return t.Flush()
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func pid(n int) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprint(n)
}

// age is the two largest units: "42s", "3m7s", "5h12m", "9d3h".
func age(p Pod) string {
	if p.Created.IsZero() {
		return "-"
	}
	s := max(p.AgeSec, 0)
	switch m, h, d := s/60, s/3600, s/86400; {
	case d > 0:
		return fmt.Sprintf("%dd%dh", d, h%24)
	case h > 0:
		return fmt.Sprintf("%dh%dm", h, m%60)
	case m > 0:
		return fmt.Sprintf("%dm%ds", m, s%60)
	}
	return fmt.Sprintf("%ds", s)
}

// Reaped is one pod that "kata-ctl gc" dealt with; with --json the command prints
// an array of them.
type Reaped struct {
	ID        string   `json:"id"`
	Namespace string   `json:"namespace"`
	Key       string   `json:"key"`
	Removed   []string `json:"removed"`
	Left      []string `json:"left"` // with the reason
}

func (o *options) gc(ctx context.Context, w io.Writer) error {
	root, err := o.stateRoot()
	if err != nil {
		return err
	}
	reports, gcErr := ledger.GC(ctx, root)
	out := make([]Reaped, 0, len(reports))
	for _, r := range reports {
		x := Reaped{ID: r.Meta.Sandbox, Namespace: r.Meta.Namespace, Key: r.Key, Removed: []string{}, Left: []string{}}
		for _, e := range r.Removed {
			x.Removed = append(x.Removed, e.String())
		}
		for _, l := range r.Left {
			x.Left = append(x.Left, l.Entry.String()+": "+l.Err.Error())
		}
		out = append(out, x)
	}
	if o.json {
		if err := printJSON(w, out); err != nil {
			return err
		}
	} else {
		printReaped(w, out)
	}
	return errors.Join(gcErr, o.collectTemplates(w))
}

func printReaped(w io.Writer, all []Reaped) {
	for _, x := range all {
		name := strings.Trim(x.Namespace+"/"+x.ID, "/")
		if name == "" {
			name = x.Key
		}
		fmt.Fprintln(w, name)
		for _, s := range x.Removed {
			fmt.Fprintln(w, "  removed", s)
		}
		for _, s := range x.Left {
			fmt.Fprintln(w, "  left", s)
		}
	}
	if len(all) == 0 {
		fmt.Fprintln(w, "nothing to remove")
	}
}
