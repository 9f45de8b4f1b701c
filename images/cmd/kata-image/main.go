// SPDX-License-Identifier: Apache-2.0

// Command kata-image builds the guest's kernel, root image and manifest; `make
// image` calls it.
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/kata-v2/kata/images/builder"
)

func main() {
	var o builder.Options
	flag.StringVar(&o.Agent, "agent", "_build/bin/kata-agent", "the static agent, /init in the guest")
	flag.StringVar(&o.Engine, "engine", "", "the static OCI engine, /usr/bin/crun in the guest")
	flag.StringVar(&o.EngineVersion, "engine-version", "", "version of the engine, for the manifest")
	flag.StringVar(&o.IPTables, "iptables", "", "the static packet filter tool, /usr/bin/iptables in the guest; none when empty")
	flag.StringVar(&o.IPTablesVersion, "iptables-version", "", "version of that tool, for the manifest")
	flag.StringVar(&o.KernelPackage, "kernel", "", "directory with an unpacked kernel package")
	flag.StringVar(&o.PackageName, "kernel-package", "", "name of that package, for the manifest")
	flag.StringVar(&o.Version, "version", "", "version of this repository, for the manifest")
	flag.StringVar(&o.Out, "out", "_build/images", "directory for the images")
	flag.Parse()
	o.AgentVersion = o.Version
	m, err := builder.Build(o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "kata-image:", err)
		os.Exit(1)
	}
	for _, f := range m.Files {
		fmt.Printf("%s/%s\t%d bytes\tsha256 %s\n", o.Out, f.Name, f.Size, f.SHA256)
	}
}
