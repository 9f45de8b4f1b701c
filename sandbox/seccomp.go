// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// The names that a seccomp filter may use (runtime-spec config-linux.md, "Seccomp").
var (
	seccompActions = []specs.LinuxSeccompAction{
		specs.ActKill, specs.ActKillProcess, specs.ActKillThread, specs.ActTrap, specs.ActErrno,
		specs.ActTrace, specs.ActAllow, specs.ActLog, specs.ActNotify,
	}
	seccompOperators = []specs.LinuxSeccompOperator{
		specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpEqualTo,
		specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpMaskedEqual,
	}
	seccompArguments = uint(6) // of a system call (seccomp(2), struct seccomp_data)
)

// validateSeccomp refuses a filter with words that mean nothing, which an engine
// in the guest would refuse late and without saying which. The names of system
// calls and architectures differ between kernels: unknown ones are left to it.
func validateSeccomp(f *specs.LinuxSeccomp) error {
	if f == nil {
		return nil
	}
	const field = "linux.seccomp."
	if err := oneOf(field+"defaultAction", f.DefaultAction, seccompActions); err != nil {
		return err
	}
	for i, s := range f.Syscalls {
		field := fmt.Sprintf("%ssyscalls[%d].", field, i)
		if len(s.Names) == 0 {
			return refuse(field+"names", "no system call", "name at least one")
		}
		if err := oneOf(field+"action", s.Action, seccompActions); err != nil {
			return err
		}
		for j, a := range s.Args {
			field := fmt.Sprintf("%sargs[%d].", field, j)
			if a.Index >= seccompArguments {
				return refuse(field+"index", fmt.Sprintf("%d: a system call has %d arguments", a.Index, seccompArguments), "count from 0")
			}
			if err := oneOf(field+"op", a.Op, seccompOperators); err != nil {
				return err
			}
		}
	}
	return nil
}

// oneOf refuses a word that is not in the list.
func oneOf[T ~string](field string, word T, list []T) error {
	if slices.Contains(list, word) {
		return nil
	}
	return refuse(field, fmt.Sprintf("%q is not known", word), fmt.Sprintf("use one of %v", list))
}
