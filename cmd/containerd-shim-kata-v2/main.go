// SPDX-License-Identifier: Apache-2.0

// Command containerd-shim-kata-v2 is the containerd shim io.containerd.kata.v2.
package main

import (
	"os"

	"github.com/kata-v2/kata/shim"
)

func main() { os.Exit(shim.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }
