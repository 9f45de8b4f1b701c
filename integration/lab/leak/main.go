// SPDX-License-Identifier: Apache-2.0

package leak

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"testing"
)

// Main is the TestMain of a package whose tests boot machines: it runs them, then
// end, which stops what they share, and fails when anything is left of the whole
// run. What the tests' own checks see before and after alike, a daemon's start
// and end, is only seen here. It returns the exit status. Nothing runs with -short.
func Main(m *testing.M, name string, end func() error) int {
	flag.Parse()
	if testing.Short() {
		fmt.Println(name + ": every test boots machines and needs what make sets up; none runs with -short")
		return 0
	}
	before, err := Take()
	if err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
		return 1
	}
	code := m.Run()
	err = end()
	left, lerr := Scope{}.Settle(before, SettleTime)
	if err = errors.Join(err, lerr); len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("left behind by the whole run:\n%s", Format(left)))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
		code = max(code, 1)
	}
	return code
}
