// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/kata-v2/kata/protocols/taskpb"
)

// TestErrorText: a client reads an error's class and its text once, however many
// errors were joined into it.
func TestErrorText(t *testing.T) {
	cause := errors.Join(fmt.Errorf("mounts[7]: %w: %w", errors.New("no such file"), errdefs.ErrInvalidArgument), nil)
	call := method(func(context.Context, *taskpb.StateRequest) (*taskpb.StateResponse, error) { return nil, cause })
	_, err := call(context.Background(), func(any) error { return nil })
	for range 2 { // the shim's answer to containerd, and containerd's to its client
		if err = errgrpc.ToNative(err); !errdefs.IsInvalidArgument(err) || err.Error() != "mounts[7]: no such file: invalid argument" {
			t.Errorf("%q", err)
		}
		err = errgrpc.ToGRPC(err)
	}
}
