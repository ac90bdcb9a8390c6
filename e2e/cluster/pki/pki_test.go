package pki

import (
	"crypto/tls"
	"crypto/x509"
	"path/filepath"
	"testing"
)

func TestAnAuthorityThatWasReadIssuesWhatTheOneThatWasMadeVouchesFor(t *testing.T) {
	made, err := NewAuthority("test")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "ca")
	if err := made.Write(path); err != nil {
		t.Fatal(err)
	}
	read, err := ReadAuthority(path)
	if err != nil {
		t.Fatal(err)
	}
	issued, err := read.Issue("server", []string{"group"}, "10.0.0.1", "name")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(issued.Certificate, issued.Key)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(made.Certificate)
	for _, host := range []string{"10.0.0.1", "name"} {
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{DNSName: host, Roots: roots}); err != nil {
			t.Error(err)
		}
	}
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{DNSName: "other", Roots: roots}); err == nil {
		t.Error("a host that it was not issued for is accepted")
	}
}
