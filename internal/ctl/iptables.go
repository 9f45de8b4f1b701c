// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/kata-v2/kata/internal/tail"
	"github.com/kata-v2/kata/protocols"
	"github.com/kata-v2/kata/protocols/agentpb"
)

// maxRules bounds a file of rules, in bytes: half of what a message to the guest may
// have (ttrpc, 4 MiB).
const maxRules = 2 << 20

// newIPTables reads and replaces the rules of the packet filter in a pod's guest,
// with the flags of `kata-runtime iptables` (Kata Containers 4.1).
func newIPTables(o *options) *cobra.Command {
	root := &cobra.Command{Use: "iptables", Short: "Show or replace the rules of the packet filter in a pod's guest", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	sub := func(use, short string, args int, f func(ctx context.Context, pod string, v6 bool, c *cobra.Command, args []string) error) {
		var pod string
		var v6 bool
		c := &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(args),
			RunE: func(c *cobra.Command, a []string) error { return f(c.Context(), pod, v6, c, a) }}
		c.Flags().StringVar(&pod, "sandbox-id", "", "the pod's id")
		c.Flags().BoolVar(&v6, "v6", false, "rules for IPv6, not IPv4")
		_ = c.MarkFlagRequired("sandbox-id")
		root.AddCommand(c)
	}
	sub("get --sandbox-id ID", "Print the rules as iptables-save does", 0, func(ctx context.Context, pod string, v6 bool, c *cobra.Command, _ []string) error {
		resp := &agentpb.GetIPTablesResponse{}
		if err := o.askPod(ctx, pod, protocols.MethodGetIPTables, &agentpb.GetIPTablesRequest{IsIpv6: v6}, resp); err != nil {
			return err
		}
		// The guest's words: without control characters for the operator's terminal.
		rules := tail.New(len(resp.Data))
		if _, err := rules.Write(resp.Data); err != nil {
			return err
		}
		if s := rules.String(); s != "" {
			fmt.Fprintln(c.OutOrStdout(), s)
		}
		return nil
	})
	sub("set --sandbox-id ID FILE", "Replace the rules of the tables in FILE (\"-\": standard input), which is as iptables-save prints", 1,
		func(ctx context.Context, pod string, v6 bool, c *cobra.Command, a []string) error {
			rules, err := readRules(a[0], c.InOrStdin())
			if err != nil {
				return err
			}
			resp := &agentpb.SetIPTablesResponse{}
			return o.askPod(ctx, pod, protocols.MethodSetIPTables, &agentpb.SetIPTablesRequest{IsIpv6: v6, Data: rules}, resp)
		})
	return root
}

// readRules reads a file of rules, or standard input.
func readRules(path string, stdin io.Reader) ([]byte, error) {
	in := stdin
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	rules, err := io.ReadAll(io.LimitReader(in, maxRules+1))
	if err != nil {
		return nil, fmt.Errorf("rules %s: %w", path, err)
	}
	if len(rules) == 0 || len(rules) > maxRules {
		return nil, fmt.Errorf("rules %s: want 1 to %d bytes: %w", path, maxRules, errdefs.ErrInvalidArgument)
	}
	return rules, nil
}

// askPod makes a call of the service protocols.PodService on the pod's shim.
func (o *options) askPod(ctx context.Context, pod, method string, req, resp any) error {
	socket, err := o.podShim(pod)
	if err != nil {
		return err
	}
	return callShim(ctx, socket, protocols.PodService, method, req, resp)
}
