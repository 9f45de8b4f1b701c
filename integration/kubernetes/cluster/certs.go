// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// certLife is how long the cluster's certificates hold; a run takes minutes.
const certLife = 24 * time.Hour

// authority signs the cluster's certificates and writes them to dir: <name>.crt
// and <name>.key, its own as ca.crt. Its key never leaves the program.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(dir string) (*authority, error) {
	a := &authority{dir: dir}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, fmt.Errorf("cluster: authority: %w", err)
	}
	template, err := certificate("kata-test-authority", nil)
	if err != nil {
		return nil, err
	}
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("cluster: authority: %w", err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		return nil, fmt.Errorf("cluster: authority: %w", err)
	}
	return a, writePEM(a.file("ca.crt"), "CERTIFICATE", der)
}

func (a *authority) file(name string) string { return filepath.Join(a.dir, name) }

// certificate is a template for a subject; organisations are Kubernetes' groups.
func certificate(name string, groups []string) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, fmt.Errorf("cluster: serial number: %w", err)
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name, Organization: groups},
		NotBefore:    now.Add(-time.Minute), NotAfter: now.Add(certLife),
		KeyUsage: x509.KeyUsageDigitalSignature,
	}, nil
}

// client writes file.crt and file.key for the user name in the groups.
func (a *authority) client(file, name string, groups ...string) error {
	template, err := certificate(name, groups)
	if err != nil {
		return err
	}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return a.issue(file, template)
}

// server writes file.crt and file.key for the hosts: names and addresses.
func (a *authority) server(file string, hosts ...string) error {
	template, err := certificate(hosts[0], nil)
	if err != nil {
		return err
	}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, h)
		}
	}
	return a.issue(file, template)
}

func (a *authority) issue(file string, template *x509.Certificate) error {
	key, err := a.keyPair(file)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return fmt.Errorf("cluster: certificate %s: %w", file, err)
	}
	return writePEM(a.file(file+".crt"), "CERTIFICATE", der)
}

// keyPair writes file.key (private) and file.pub.
func (a *authority) keyPair(file string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("cluster: key %s: %w", file, err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("cluster: key %s: %w", file, err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("cluster: key %s: %w", file, err)
	}
	if err := writePEM(a.file(file+".key"), "EC PRIVATE KEY", private); err != nil {
		return nil, err
	}
	return key, writePEM(a.file(file+".pub"), "PUBLIC KEY", public)
}

func writePEM(path, kind string, der []byte) error {
	data := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	return nil
}

// kubeconfig writes <file>.conf for the client certificate of that name.
func (a *authority) kubeconfig(file, server string) error {
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
- name: test
  cluster: {server: %q, certificate-authority: %q}
users:
- name: user
  user: {client-certificate: %q, client-key: %q}
contexts:
- name: test
  context: {cluster: test, user: user}
current-context: test
`, server, a.file("ca.crt"), a.file(file+".crt"), a.file(file+".key"))
	if err := os.WriteFile(a.file(file+".conf"), []byte(text), 0o600); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	return nil
}
