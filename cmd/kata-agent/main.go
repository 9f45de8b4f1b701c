// SPDX-License-Identifier: Apache-2.0

// Command kata-agent is PID 1 of the guest. Built without cgo it is one static
// file that needs nothing of the guest image but an OCI engine.
//
// The guest's CPUs change only when OnlineCPUMem says so, hence the directives:
// no periodic look at them, and no reading of cgroup files at start.

//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0
package main

import (
	"context"
	"fmt"
	"os"

	guestagent "github.com/kata-v2/kata/guest-agent"
	"github.com/kata-v2/kata/guest-agent/boot"
	"github.com/kata-v2/kata/guest-agent/podinit"
)

// version is set by the linker.
var version = "dev"

func main() {
	if os.Args[0] == podinit.Name {
		fmt.Fprintln(os.Stderr, podinit.Main())
		os.Exit(1)
	}
	if os.Args[0] == boot.Modprobe {
		os.Exit(boot.ModprobeMain(os.Args[1:]))
	}
	if len(os.Args) > 1 && (os.Args[1] == "--version" || os.Args[1] == "-v") {
		fmt.Println("kata-agent version " + version)
		return
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "kata-agent is the init of a Kata guest and runs as process 1 there; see --version")
		os.Exit(2)
	}
	err := guestagent.Run(context.Background(), version)
	if err != nil {
		guestagent.Fatal(err)
	}
	// The kernel panics when PID 1 ends, and the host sees the machine go (panic=1).
	os.Exit(1)
}
