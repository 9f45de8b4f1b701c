// SPDX-License-Identifier: Apache-2.0

package ctl

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/internal/directvolume"
	"github.com/kata-v2/kata/protocols/agentpb"
	"github.com/kata-v2/kata/sandbox/ledger"
)

// VolumeStats is what "kata-ctl direct-volume stats" prints, always as JSON: the
// usage of a volume in the terms of the CSI specification.
type VolumeStats struct {
	Usage     []VolumeUsage   `json:"usage"`
	Condition VolumeCondition `json:"volume_condition"`
}

// VolumeUsage counts bytes or inodes.
type VolumeUsage struct {
	Available uint64 `json:"available"`
	Total     uint64 `json:"total"`
	Used      uint64 `json:"used"`
	Unit      string `json:"unit"` // "bytes" or "inodes"
}

// VolumeCondition says whether something is wrong with the volume.
type VolumeCondition struct {
	Abnormal bool   `json:"abnormal"`
	Message  string `json:"message"`
}

func newDirectVolume(o *options) *cobra.Command {
	root := &cobra.Command{Use: "direct-volume", Short: "Register block devices that pods mount by themselves", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	sub := func(use, short string, args int, f func(ctx context.Context, w io.Writer, args []string) error) {
		root.AddCommand(&cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(args),
			RunE: func(c *cobra.Command, a []string) error { return f(c.Context(), c.OutOrStdout(), a) }})
	}
	sub("add VOLUME-PATH MOUNT-INFO", "Register a volume; MOUNT-INFO is JSON with volume-type, device, fstype, metadata and options", 2,
		func(_ context.Context, _ io.Writer, a []string) error {
			m, err := directvolume.Parse([]byte(a[1]))
			if err != nil {
				return err
			}
			return directvolume.Add(o.host.directVolumes, filepath.Clean(a[0]), m)
		})
	sub("remove VOLUME-PATH", "Take a volume out of the register", 1, func(_ context.Context, _ io.Writer, a []string) error {
		return directvolume.Remove(o.host.directVolumes, filepath.Clean(a[0]))
	})
	sub("stats VOLUME-PATH", "Show the usage of a volume that a running pod has", 1, func(ctx context.Context, w io.Writer, a []string) error {
		resp := &agentpb.VolumeStatsResponse{}
		if err := o.askShim(ctx, a[0], directvolume.MethodStats, &agentpb.VolumeStatsRequest{VolumeGuestPath: filepath.Clean(a[0])}, resp); err != nil {
			return err
		}
		return printJSON(w, volumeStats(resp))
	})
	sub("resize VOLUME-PATH BYTES", "Grow the file system of a volume that a running pod has; its device has grown already", 2,
		func(ctx context.Context, _ io.Writer, a []string) error {
			size, err := strconv.ParseUint(a[1], 10, 63)
			if err != nil {
				return fmt.Errorf("size %q: want a number of bytes: %w", a[1], errdefs.ErrInvalidArgument)
			}
			return o.askShim(ctx, a[0], directvolume.MethodResize,
				&agentpb.ResizeVolumeRequest{VolumeGuestPath: filepath.Clean(a[0]), Size: size}, &emptypb.Empty{})
		})
	return root
}

func volumeStats(r *agentpb.VolumeStatsResponse) VolumeStats {
	out := VolumeStats{Usage: []VolumeUsage{}, Condition: VolumeCondition{r.GetVolumeCondition().GetAbnormal(), r.GetVolumeCondition().GetMessage()}}
	units := map[agentpb.VolumeUsage_Unit]string{agentpb.VolumeUsage_BYTES: "bytes", agentpb.VolumeUsage_INODES: "inodes"}
	for _, u := range r.Usage {
		out.Usage = append(out.Usage, VolumeUsage{u.Available, u.Total, u.Used, units[u.Unit]})
	}
	return out
}

// askShim calls the shim of the pod that has the volume.
func (o *options) askShim(ctx context.Context, volume, call string, req, resp any) error {
	socket, err := o.volumeShim(filepath.Clean(volume))
	if err != nil {
		return err
	}
	return callShim(ctx, socket, directvolume.Service, call, req, resp)
}

// volumeShim is the socket of the shim whose pod has the volume.
func (o *options) volumeShim(volume string) (string, error) {
	users, err := directvolume.Users(o.host.directVolumes, volume)
	if err != nil {
		return "", err
	}
	sockets, err := o.shimsOf(func(i ledger.Info) bool { return slices.Contains(users, i.Meta.Sandbox) })
	if err != nil {
		return "", err
	}
	if len(sockets) == 0 {
		return "", fmt.Errorf("no running pod has the volume %s: %w", volume, errdefs.ErrFailedPrecondition)
	}
	return sockets[0], nil
}
