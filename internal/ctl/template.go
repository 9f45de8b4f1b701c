// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/kata-v2/kata/sandbox"
	"github.com/kata-v2/kata/sandbox/template"
)

func newTemplate(o *options) *cobra.Command {
	c := &cobra.Command{
		Use: "template", Short: "Make, show and remove the machines from which pods are cloned (factory.enable_template)",
		Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(
		command("init", "Make the templates of the configuration, unless they are there", o, (*options).templateInit),
		command("status", "List the templates and compare each with what was saved; exits 1 when one is broken", o, (*options).templateStatus),
		command("destroy", "Remove all templates; running pods go on", o, (*options).templateDestroy),
	)
	return c
}

// templateInit is for an operator, who may prepare what is not enabled yet.
func (o *options) templateInit(ctx context.Context, w io.Writer) error {
	c, _, err := o.load()
	if err != nil {
		return err
	}
	digests, err := sandbox.MakeTemplates(ctx, c, runtime.NumCPU(), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	if o.json {
		return printJSON(w, map[string][]string{"digests": digests})
	}
	for _, d := range digests {
		fmt.Fprintln(w, d)
	}
	return nil
}

// TemplateStatus is one template as "kata-ctl template status" shows it; with
// --json the command prints an array of them.
type TemplateStatus struct {
	Digest  string       `json:"digest"`
	Error   string       `json:"error,omitempty"` // what is wrong with it
	Created time.Time    `json:"created,omitzero"`
	Stored  int64        `json:"stored_bytes"` // of memory
	Users   []int        `json:"users"`        // processes whose machines share its memory now
	Key     template.Key `json:"key"`
}

func (o *options) templateStatus(_ context.Context, w io.Writer) error {
	store, err := o.templates()
	if err != nil {
		return err
	}
	digests, err := store.List()
	if err != nil {
		return err
	}
	out := make([]TemplateStatus, 0, len(digests))
	broken := false
	for _, d := range digests {
		st := TemplateStatus{Digest: d, Users: []int{}, Key: template.Key{}}
		t, err := store.Open(d)
		if err == nil {
			st.Created, st.Stored, st.Key = t.Created, t.MemoryStored, t.Key
			st.Users = append(st.Users, t.Users()...)
			err = t.Verify()
		}
		if err != nil {
			st.Error, broken = err.Error(), true
		}
		out = append(out, st)
	}
	if o.json {
		err = printJSON(w, out)
	} else {
		printTemplates(w, out)
	}
	if err == nil && broken {
		err = errFailed
	}
	return err
}

func printTemplates(w io.Writer, all []TemplateStatus) {
	for _, t := range all {
		if t.Error != "" {
			fmt.Fprintf(w, "%s  broken: %s\n", t.Digest, t.Error)
			continue
		}
		fmt.Fprintf(w, "%s  whole, made %s, %d MiB, shared by %d processes\n", t.Digest, t.Created.Format(time.RFC3339), t.Stored>>20, len(t.Users))
		for _, f := range t.Key {
			fmt.Fprintf(w, "  %-18s %s\n", f.Name, f.Value)
		}
	}
	if len(all) == 0 {
		fmt.Fprintln(w, "no templates")
	}
}

func (o *options) templateDestroy(_ context.Context, w io.Writer) error {
	store, err := o.templates()
	if err != nil {
		return err
	}
	removed, err := store.Clear(func(string) bool { return true })
	for _, d := range removed {
		fmt.Fprintln(w, "removed", d)
	}
	if errdefs.IsUnavailable(err) {
		err = fmt.Errorf("%w; try again", err)
	}
	return err
}

func (o *options) templates() (*template.Store, error) {
	c, _, err := o.load()
	if err != nil {
		return nil, err
	}
	return sandbox.Templates(c), nil
}

// collectTemplates removes those that no machine uses and no pod can start from
// any more, because they are broken or their kernel, image or VMM has changed.
func (o *options) collectTemplates(w io.Writer) error {
	c, _, err := o.load()
	if err != nil {
		if o.stateDir != "" {
			return nil // the operator named what is to be collected, and the configuration is broken
		}
		return err
	}
	store := sandbox.Templates(c)
	removed, err := store.Clear(func(d string) bool {
		t, err := store.Open(d)
		return err != nil || t.Stale() && len(t.Users()) == 0
	})
	if !o.json {
		for _, d := range removed {
			fmt.Fprintln(w, "template", d, "removed")
		}
	}
	if errors.Is(err, template.ErrBusy) {
		return nil // the one that is being made is in use
	}
	return err
}
