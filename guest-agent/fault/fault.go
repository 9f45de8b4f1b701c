// SPDX-License-Identifier: Apache-2.0

// Package fault classifies the agent's errors. Code below the RPC service
// returns ordinary wrapped errors, marked with a Kind where the caller is meant
// to act on it; the service turns the Kind into a ttrpc status once, at the edge.
package fault

import (
	"errors"
	"fmt"
)

// Kind is what an error means to the caller of an RPC.
type Kind int

// The kinds, each with the gRPC status code that the service answers.
const (
	Internal           Kind = iota // Internal: the guest failed
	NotFound                       // NotFound: no such container, process, device
	AlreadyExists                  // AlreadyExists: the id is taken
	InvalidArgument                // InvalidArgument: the request can never work
	FailedPrecondition             // FailedPrecondition: not in this state, not in this guest image
	Unimplemented                  // Unimplemented: this agent does not do it
	Unavailable                    // Unavailable: the agent is shutting down
)

// Error is an error with a Kind.
type Error struct {
	Kind Kind
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// New makes an error of kind k; format and args are those of fmt.Errorf, %w included.
func New(k Kind, format string, args ...any) error {
	return &Error{Kind: k, Err: fmt.Errorf(format, args...)}
}

// KindOf is the kind of the outermost marked error in err's chain; Internal when there is none.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return Internal
}
