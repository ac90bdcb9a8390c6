// Package kubeconfig writes the files by which a client finds the API server and shows who it is.
package kubeconfig

import (
	"os"
	"strconv"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"millrace.dev/e2e/cluster/pki"
	"millrace.dev/e2e/cluster/plan"
)

const name = "millrace-cluster"

// Write writes a kubeconfig with a new certificate in it.
func Write(path string, authority *pki.Authority, user string, groups []string) error {
	pair, err := authority.Issue(user, groups)
	if err != nil {
		return err
	}
	config := api.NewConfig()
	config.Clusters[name] = &api.Cluster{Server: plan.APIServer, CertificateAuthorityData: authority.Certificate}
	config.AuthInfos[user] = &api.AuthInfo{ClientCertificateData: pair.Certificate, ClientKeyData: pair.Key}
	config.Contexts[name] = &api.Context{Cluster: name, AuthInfo: user}
	config.CurrentContext = name
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		return err
	}
	// For nobody else to read; but who asked for root's help for this is to use it.
	if owner, err := strconv.Atoi(os.Getenv("SUDO_UID")); err == nil {
		return os.Chown(path, owner, -1)
	}
	return nil
}
