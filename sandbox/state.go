// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
)

// State of a sandbox, container or process.
type State int

// The states; see the drawing in doc.go.
const (
	Created State = iota
	Running
	Paused
	Stopped
	Deleted
)

// String is the state's name.
func (s State) String() string {
	if s < Created || s > Deleted {
		return fmt.Sprintf("state(%d)", int(s))
	}
	return [...]string{"created", "running", "paused", "stopped", "deleted"}[s]
}

// transitions lists where each state may go.
var transitions = map[State][]State{
	Created: {Running, Stopped, Deleted},
	Running: {Paused, Stopped},
	Paused:  {Running, Stopped},
	Stopped: {Deleted},
}

// checkTransition returns FailedPrecondition for a way the table does not have.
func checkTransition(what string, from, to State) error {
	if slices.Contains(transitions[from], to) {
		return nil
	}
	return fmt.Errorf("%s is %s and cannot become %s: %w", what, from, to, errdefs.ErrFailedPrecondition)
}
