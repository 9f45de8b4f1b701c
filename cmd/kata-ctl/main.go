// SPDX-License-Identifier: Apache-2.0

// kata-ctl checks a host and looks after its pods; see internal/ctl.
package main

import (
	"os"

	"github.com/kata-v2/kata/internal/ctl"
)

func main() { os.Exit(ctl.Main(os.Args[1:], os.Stdout, os.Stderr)) }
