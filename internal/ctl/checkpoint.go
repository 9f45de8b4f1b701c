// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/checkpoint"
)

func newCheckpoint(o *options) *cobra.Command {
	end := false
	c := &cobra.Command{Use: "checkpoint POD DIRECTORY", Short: "Save a running pod in a directory that is new or empty", Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, a []string) error { return o.checkpoint(c.Context(), a[0], a[1], end) }}
	c.Flags().BoolVar(&end, "end", false, "end the pod once it is saved")
	return c
}

func (o *options) checkpoint(ctx context.Context, pod, dir string, end bool) error {
	socket, err := o.podShim(pod)
	if err != nil {
		return err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	return callShimFor(ctx, checkpoint.Timeout, socket, checkpoint.Service, checkpoint.MethodSave, &agentpb.SaveRequest{Path: dir, End: end}, &emptypb.Empty{})
}

func newRestore(o *options) *cobra.Command {
	return &cobra.Command{Use: "restore DIRECTORY", Short: "Verify a checkpoint and say how containerd restores it", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, a []string) error { return o.restore(c.OutOrStdout(), a[0]) }}
}

// Restorable is what "kata-ctl restore --json" prints.
type Restorable struct {
	Pod         string            `json:"pod"`
	Created     time.Time         `json:"created"`
	Containers  []string          `json:"containers"` // by the names with which new ones find them
	Annotations map[string]string `json:"annotations"`
}

// RestoreAnnotation names the directory of a checkpoint on a pod's container.
const RestoreAnnotation = "io.katacontainers.config.runtime.restore"

func (o *options) restore(w io.Writer, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	c, err := checkpoint.Open(dir)
	if err == nil {
		err = c.Verify()
	}
	if err != nil {
		return err
	}
	r := Restorable{Pod: c.Sandbox, Created: c.Created, Containers: []string{}, Annotations: map[string]string{RestoreAnnotation: dir}}
	for _, x := range c.Containers {
		r.Containers = append(r.Containers, x.Name)
	}
	if o.json {
		return printJSON(w, r)
	}
	_, err = fmt.Fprintf(w, "pod %s, saved %s, is whole; a pod with the annotation\n  %s=%s\ngoes on with its containers: %s\n",
		r.Pod, r.Created.Format(time.RFC3339), RestoreAnnotation, dir, strings.Join(r.Containers, ", "))
	return err
}
