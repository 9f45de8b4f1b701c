// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"slices"
	"strings"
	"testing"
)

func TestCertificates(t *testing.T) {
	a, err := newAuthority(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := a.server("server", "kubernetes.default", "10.96.0.1"); err != nil {
		t.Fatal(err)
	}
	if err := a.client("user", "system:node:node", "system:nodes"); err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	server, user := load(t, a, "server"), load(t, a, "user")
	for _, name := range []string{"kubernetes.default", "10.96.0.1"} {
		if _, err := server.Verify(x509.VerifyOptions{Roots: roots, DNSName: name}); err != nil {
			t.Errorf("as %s: %v", name, err)
		}
	}
	if _, err := server.Verify(x509.VerifyOptions{Roots: roots, DNSName: "elsewhere"}); err == nil {
		t.Error("a server's certificate holds for any name")
	}
	if _, err := server.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err == nil {
		t.Error("a server's certificate is a client's as well")
	}
	if _, err := user.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	if user.Subject.CommonName != "system:node:node" || !slices.Equal(user.Subject.Organization, []string{"system:nodes"}) {
		t.Errorf("the user is %v", user.Subject)
	}
}

// load reads a certificate with its key, which must belong together.
func load(t *testing.T, a *authority, name string) *x509.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(a.file(name+".crt"), a.file(name+".key"))
	if err != nil {
		t.Fatal(err)
	}
	return pair.Leaf
}

func TestKubeconfigNamesTheIdentity(t *testing.T) {
	a, err := newAuthority(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := a.kubeconfig("admin", "https://127.0.0.1:1"); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(a.file("admin.conf"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`server: "https://127.0.0.1:1"`, a.file("ca.crt"), a.file("admin.crt"), a.file("admin.key")} {
		if !strings.Contains(string(data), want) {
			t.Errorf("no %q in\n%s", want, data)
		}
	}
}
