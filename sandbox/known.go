// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-v2/kata/sandbox/storage"
)

// known decides when the guest is to forget files, so that the virtio-fs daemon,
// which has one open for each that the guest knows, does not come to its limit. At
// the limit look-ups fail, and the guest's kernel would take mount points that it
// cannot look up for gone.
type known struct {
	limit int // what the daemon may have open
	kept  int // what it had open at the least since the guest forgot: it is in use
}

// lookups is how many files a fast guest looks at in a second.
const lookups = 50_000

// interval between two looks, in which no guest gets from one mark to the limit.
func (k *known) interval() time.Duration {
	return max(50*time.Millisecond, time.Duration(k.limit/4)*time.Second/lookups)
}

// look is told how many files are open now, and says whether the guest is to
// forget: at a quarter of the way from what it needs to the limit.
func (k *known) look(open int) bool {
	k.kept = min(k.kept, open)
	return open > k.kept+(k.limit-k.kept)/4
}

// forgot is told that the guest has; what is open at the next look it needs.
func (k *known) forgot() { k.kept = k.limit }

// keepKnown has the guest forget files until the machine or the daemon ends. Nothing
// tells how many a process has open, so it looks now and then; it has nothing to do
// on a host whose limit is beyond the guest's memory.
func (m *machine) keepKnown(d *storage.Daemon) {
	limit, enough := d.Files()
	if enough {
		return
	}
	k := &known{limit: limit}
	tick := time.NewTicker(k.interval())
	defer tick.Stop()
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-d.Done():
			return
		case <-tick.C:
		}
		open, err := d.Open()
		if err != nil || !k.look(open) {
			continue // a daemon that ends says so by itself
		}
		_, err = m.agent.Files.Forget(m.ctx, &emptypb.Empty{})
		if err = m.agent.Err(err); err != nil {
			m.log.Warn("the guest does not forget files", "open", open, "limit", limit, "error", err)
			if errdefs.IsNotImplemented(err) {
				return // an older guest
			}
		}
		m.log.Debug("the guest forgets files", "open", open, "limit", limit)
		k.forgot()
	}
}
