// Package pki issues the cluster's certificates.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"time"
)

// A cluster lives for hours; a year leaves room for one that was forgotten.
const lifetime = 365 * 24 * time.Hour

// Pair is a certificate and its key, in PEM.
type Pair struct{ Certificate, Key []byte }

// Write writes the pair to PATH.crt and PATH.key.
func (p Pair) Write(path string) error {
	if err := os.WriteFile(path+".crt", p.Certificate, 0o644); err != nil {
		return err
	}
	return os.WriteFile(path+".key", p.Key, 0o600)
}

// Authority signs certificates.
type Authority struct {
	Pair
	certificate *x509.Certificate
	key         crypto.Signer
}

// NewAuthority makes an authority that signs itself.
func NewAuthority(name string) (*Authority, error) {
	template := newTemplate(pkix.Name{CommonName: name})
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	a := &Authority{key: key}
	if a.Pair, err = sign(template, template, key, key); err != nil {
		return nil, err
	}
	block, _ := pem.Decode(a.Certificate)
	a.certificate, err = x509.ParseCertificate(block.Bytes)
	return a, err
}

// ReadAuthority reads an authority that Write wrote.
func ReadAuthority(path string) (*Authority, error) {
	a := &Authority{}
	var err error
	if a.Certificate, err = os.ReadFile(path + ".crt"); err != nil {
		return nil, err
	}
	if a.Key, err = os.ReadFile(path + ".key"); err != nil {
		return nil, err
	}
	certificate, _ := pem.Decode(a.Certificate)
	if a.certificate, err = x509.ParseCertificate(certificate.Bytes); err != nil {
		return nil, err
	}
	key, _ := pem.Decode(a.Key)
	a.key, err = x509.ParseECPrivateKey(key.Bytes)
	return a, err
}

// Issue makes a certificate for a client and server: Kubernetes takes the name as its user, the groups as its groups, and clients take
// the hosts (names or addresses) as where it may be found.
func (a *Authority) Issue(name string, groups []string, hosts ...string) (Pair, error) {
	template := newTemplate(pkix.Name{CommonName: name, Organization: groups})
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	for _, host := range hosts {
		if address := net.ParseIP(host); address != nil {
			template.IPAddresses = append(template.IPAddresses, address)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Pair{}, err
	}
	return sign(template, a.certificate, key, a.key)
}

func newTemplate(name pkix.Name) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		panic(err) // the system has no randomness
	}
	// An hour back, for clocks that differ.
	now := time.Now().Add(-time.Hour)
	return &x509.Certificate{SerialNumber: serial, Subject: name, NotBefore: now, NotAfter: now.Add(lifetime)}
}

func sign(template, parent *x509.Certificate, key *ecdsa.PrivateKey, by crypto.Signer) (Pair, error) {
	certificate, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), by)
	if err != nil {
		return Pair{}, err
	}
	encoded, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return Pair{}, err
	}
	return Pair{
		Certificate: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate}),
		Key:         pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: encoded}),
	}, nil
}
