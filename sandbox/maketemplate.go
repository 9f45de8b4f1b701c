// SPDX-License-Identifier: Apache-2.0

package sandbox

// makeTemplate has the template made from which this machine could have been
// started, for the pods to come.
func (s *Sandbox) makeTemplate(m *machine) {
	h, ok := s.o.Hypervisor.(interface{ wantsTemplate() bool })
	if s.o.MakeTemplate == nil || !ok || !h.wantsTemplate() {
		return
	}
	place := func(int) error { return nil }
	if m.cgroup != nil {
		place = m.cgroup.SendHome
	}
	if err := s.o.MakeTemplate(m.ctx, s.o.Config, m.alone, place); err != nil && m.ctx.Err() == nil {
		s.o.Log.Warn("make a template", "error", err)
	}
}
