// SPDX-License-Identifier: Apache-2.0

// Package ctl is the logic of kata-ctl, the operator's command: check, env,
// version, ps, gc, overhead, template, checkpoint, restore, direct-volume,
// iptables, install and uninstall. Only checkpoint, iptables and the direct-volume
// commands stats and resize talk to a live shim.
package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kata-v2/kata/internal/config"
	"github.com/kata-v2/kata/internal/version"
)

// errFailed ends the command with status 1 when its output has said why already.
var errFailed = errors.New("failed")

// options are the flags that all commands share.
type options struct {
	config   string
	stateDir string
	json     bool
	host     host
}

// Main runs kata-ctl and returns the exit status: 0, or 1 when something failed.
func Main(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	return run(ctx, thisHost(), args, stdout, stderr)
}

func run(ctx context.Context, h host, args []string, stdout, stderr io.Writer) int {
	cmd := newRoot(&options{host: h})
	cmd.SetArgs(args)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if !errors.Is(err, errFailed) {
		fmt.Fprintln(stderr, "kata-ctl:", err)
	}
	return 1
}

func newRoot(o *options) *cobra.Command {
	root := &cobra.Command{
		Use:           "kata-ctl",
		Short:         "Look at and look after the pods of containerd-shim-kata-v2",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		// Runnable, so that an unknown command is an error and not the help text.
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	f := root.PersistentFlags()
	f.StringVar(&o.config, "config", "", "configuration file (default: as the shim finds it)")
	f.StringVar(&o.stateDir, "state-dir", "", "directory of the pods' ledgers (default: state_dir of the configuration)")
	f.BoolVar(&o.json, "json", false, "print JSON")
	root.AddCommand(
		command("check", "Check what a pod needs of this host; exits 1 when something fails", o, (*options).check),
		command("env", "Show the effective configuration, versions and paths", o, (*options).env),
		command("version", "Show the version of this build", o, (*options).version),
		command("ps", "List the pods of this host", o, (*options).ps),
		command("gc", "Remove what pods left whose shim was killed", o, (*options).gc),
		newOverhead(o),
		newTemplate(o),
		newDirectVolume(o),
		newIPTables(o),
		newCheckpoint(o),
		newRestore(o),
		newInstall(o),
		newUninstall(o),
	)
	return root
}

func command(name, short string, o *options, f func(*options, context.Context, io.Writer) error) *cobra.Command {
	return &cobra.Command{Use: name, Short: short, Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error {
		return f(o, c.Context(), c.OutOrStdout())
	}}
}

func (o *options) load() (*config.Config, []config.Warning, error) {
	return config.Load(config.LoadOptions{Path: o.config})
}

// stateRoot is the directory of the ledgers; a broken configuration does not
// matter when the flag names it.
func (o *options) stateRoot() (string, error) {
	if o.stateDir != "" {
		return o.stateDir, nil
	}
	c, _, err := o.load()
	if err != nil {
		return "", fmt.Errorf("%w (or name the directory with --state-dir)", err)
	}
	return c.Runtime.StateDir, nil
}

func (o *options) version(_ context.Context, w io.Writer) error {
	if o.json {
		return printJSON(w, version.Get())
	}
	_, err := fmt.Fprintln(w, version.Get())
	return err
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}
