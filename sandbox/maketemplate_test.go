// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"testing"

	"github.com/kata-v2/kata/hypervisor/hypervisortest"
	"github.com/kata-v2/kata/internal/config"
)

// wanting is a hypervisor that has not found a template.
type wanting struct {
	*hypervisortest.Fake
	wants bool
}

func (w *wanting) wantsTemplate() bool { return w.wants }

// A template that is wanted is made when the first container runs; that the pod ends does not wait for it.
func TestTemplateIsMade(t *testing.T) {
	for _, wants := range []bool{true, false} {
		p := newPod(t)
		begun := make(chan bool, 1)
		p.o.Hypervisor = &wanting{p.fake, wants}
		p.o.MakeTemplate = func(ctx context.Context, c *config.Config, alone bool, place func(int) error) error {
			begun <- alone && c == p.config && place(1) == nil
			<-ctx.Done()
			return ctx.Err()
		}
		p.start("pod", "sleep")
		if wants && !<-begun {
			t.Error("not that of a pod of one container")
		}
		must(t, p.Stop(bounded(t)))
		if len(begun) > 0 {
			t.Error("a template that is not wanted is made")
		}
	}
}
